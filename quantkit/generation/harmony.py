"""Harmony, the message format of gpt-oss: the messages of an answer, read from its token ids.

gpt-oss writes each message as <|start|> ROLE <|channel|> NAME <|message|> TEXT <|end|>, with its
reasoning in the channel `analysis`, its answer in `final`, and calls of tools addressed by `to=`.
Marks are identified by token ids, since text may contain the same words.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

ANALYSIS, COMMENTARY, FINAL = "analysis", "commentary", "final"
_MARKS = ("start", "channel", "message", "constrain", "end", "return", "call")
_CONTENT_TYPES = {"json", "code", "text"}
_RECIPIENT = re.compile(r"\bto=(\S+)")


@dataclass(frozen=True)
class Delta:
    """Some new text of one channel; a model without channels has only the final one.

    `recipient` is the tool that is called with the text, such as functions.get_weather; `message`
    counts the messages of the answer. A call begins with a delta without text.
    """

    channel: str
    text: str
    recipient: str | None = None
    message: int = 0


class Channels:
    """The messages of one model's answers. `tokenizer` is mlx-lm's."""

    def __init__(self, tokenizer: Any) -> None:
        vocabulary = tokenizer.get_vocab()
        self.marks: dict[int, str] = {
            vocabulary[mark]: name for name in _MARKS if (mark := f"<|{name}|>") in vocabulary
        }
        self.tokenizer = tokenizer
        self.has_channels = {"channel", "message"} <= set(self.marks.values())
        """Whether the tokenizer has Harmony's channel tokens."""
        ids = getattr(tokenizer, "all_special_ids", None) or ()
        self.unspoken = {*self.marks, *ids} if self.has_channels else set()

    def deltas(self, tokens: Iterable[int]) -> Iterator[Delta]:
        """Yield the text of `tokens`, without Harmony's markup, as it arrives."""
        reader = HarmonyReader(self)
        for token in tokens:
            yield from reader.push(token)
        yield from reader.finish()


class HarmonyReader:
    """Reads one answer token by token, and never fails.

    Text without a channel is the answer if no message follows it, and reasoning if one does, so it
    waits until that is known. Words in a header that name nothing belong to the text.
    """

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._text = channels.tokenizer.detokenizer
        self._begin_text()
        self._message = 0
        self._header: list[int] = []
        self._words: list[str] = []
        self._section: str | None = None
        """The section of a header that is being read: role, channel or type; None in a text."""
        self._channel: str | None = None if channels.has_channels else FINAL
        self._recipient: str | None = None
        self._waiting = ""

    def push(self, token: int) -> list[Delta]:
        """Return the new text that `token` brings."""
        mark = self._channels.marks.get(token) if self._channels.has_channels else None
        if mark is not None:
            return self._marked(mark)
        if token in self._channels.unspoken:
            return []
        if self._section:
            self._header.append(token)
            return []
        self._text.add_token(token)
        return self._spoken(str(self._text.last_segment))

    def finish(self) -> list[Delta]:
        """Return the text that still waited when the answer ended."""
        deltas = self._end()
        if self._waiting.strip():
            deltas.append(Delta(FINAL, self._waiting, None, self._message))
        self._waiting = ""
        return deltas

    def _begin_text(self) -> None:
        """Begin a text behind a mark: mlx-lm's detokenizers drop a space where nothing precedes."""
        self._text.reset()
        if self._channels.has_channels:
            self._text.add_token(next(iter(self._channels.marks)))
            _ = self._text.last_segment

    def _marked(self, mark: str) -> list[Delta]:
        if mark == "constrain":
            self._read_section()
            self._section = "type" if self._section else None
            return []
        if mark == "message":
            return self._open() if self._section else []
        if mark == "channel" and self._section == "role":
            # The role before a channel, with a recipient, belongs to the same message.
            self._read_section()
            self._section = "channel"
            return []
        if mark == "channel":
            deltas = self._end(at_channel=True)
            self._section = "channel"
            return deltas
        deltas = self._end()
        self._section = "role" if mark == "start" else None
        return deltas

    def _end(self, *, at_channel: bool = False) -> list[Delta]:
        """End a message, even one whose header never ended."""
        deltas = self._open() if self._section else []
        self._text.finalize()
        deltas += self._spoken(str(self._text.last_segment))
        self._begin_text()
        bare = self._channel is None and self._recipient is None
        if not bare:
            self._message += 1
        self._section = self._recipient = None
        self._channel = None if self._channels.has_channels else FINAL
        if at_channel and bare and (match := _RECIPIENT.search(self._waiting)):
            self._waiting = self._waiting[: match.start()] + self._waiting[match.end() :]
            self._address(match[1])
        return deltas

    def _read_section(self) -> None:
        """Read a section of a header, and note its words that name nothing."""
        section, tokens = self._section, self._header
        self._header = []
        text = str(self._channels.tokenizer.decode(tokens)) if tokens else ""
        if match := _RECIPIENT.search(text):
            text = f"{text[: match.start()]} {text[match.end() :]}"
            self._address(match[1])
        words = text.split()
        if section == "channel":
            self._channel = words.pop(0) if words else self._channel
        elif section == "role":
            words = words[1:]
        if words and (section == "type" or (words[0] in _CONTENT_TYPES and self._recipient)):
            words.pop(0)
        self._words += words

    def _open(self) -> list[Delta]:
        """Begin the text of a message, whose header has ended."""
        self._read_section()
        self._section = None
        words, self._words = self._words, []
        deltas = self._thoughts() if self._channel or self._recipient else []
        if self._recipient:
            deltas.append(Delta(self._channel or COMMENTARY, "", self._recipient, self._message))
        return deltas + self._spoken("".join(f"{word} " for word in words))

    def _address(self, name: str) -> None:
        """Note the recipient of a message, which may be glued to what follows."""
        self._recipient = name.partition("<|")[0]

    def _spoken(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._channel is None and self._recipient is None:
            self._waiting += text
            return []
        channel = self._channel or COMMENTARY
        return [*self._thoughts(), Delta(channel, text, self._recipient, self._message)]

    def _thoughts(self) -> list[Delta]:
        """Return the text without a channel, which a message follows, as reasoning."""
        text, self._waiting = self._waiting, ""
        if not text.strip():
            return []
        self._message += 1
        return [Delta(ANALYSIS, text, None, self._message - 1)]


def read_calls(deltas: Iterable[Delta]) -> list[tuple[str, str]]:
    """Return the calls in an answer: the name of a function, and its arguments as they stand."""
    names: dict[int, str] = {}
    texts: dict[int, str] = {}
    for delta in deltas:
        if delta.recipient is not None:
            names[delta.message] = delta.recipient.removeprefix("functions.")
            texts[delta.message] = texts.get(delta.message, "") + delta.text
    return [(name, texts[message]) for message, name in names.items()]
