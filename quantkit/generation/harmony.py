"""Harmony, the message format of gpt-oss: the channels of an answer.

gpt-oss writes each message as <|channel|> NAME <|message|> TEXT <|end|>, with its reasoning in the
channel `analysis` and its answer in `final`. Channels are identified by token ids, since text may
contain the same words.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

FINAL = "final"


@dataclass(frozen=True)
class Delta:
    """Some new text of one channel; a model without channels has only the final one.

    `recipient` is the tool that is called with the text, such as functions.get_weather.
    """

    channel: str
    text: str
    recipient: str | None = None


class Channels:
    """Splits a stream of token ids by channel. `tokenizer` is mlx-lm's."""

    def __init__(self, tokenizer: Any) -> None:
        vocabulary = tokenizer.get_vocab()
        self._channel = vocabulary.get("<|channel|>")
        self._message = vocabulary.get("<|message|>")
        ends = ("<|start|>", "<|end|>", "<|return|>", "<|call|>")
        self._ends = {vocabulary[name] for name in ends if name in vocabulary}
        self._tokenizer = tokenizer

    @property
    def has_channels(self) -> bool:
        """Whether the tokenizer has Harmony's channel tokens."""
        return self._channel is not None and self._message is not None

    def deltas(self, tokens: Iterable[int]) -> Iterator[Delta]:
        """Yield the text of `tokens`, without Harmony's markup, as it arrives.

        Text before the first markup, or in a channel without a name, belongs to the final channel.
        Roles between two messages are not text.
        """
        text = self._tokenizer.detokenizer
        text.reset()
        name: list[int] = []
        channel, recipient, inside, naming = FINAL, None, True, False
        for token in tokens:
            if self.has_channels and (
                token in (self._channel, self._message) or token in self._ends
            ):
                if inside and (tail := _tail(text)):
                    yield Delta(channel, tail, recipient)
                text.reset()
                if token == self._message:
                    if naming:
                        header = self._tokenizer.decode(name).split()
                        channel = next(iter(header), FINAL)
                        recipient = _recipient(header)
                    inside = True
                else:
                    inside = False
                naming = token == self._channel
                name = []
            elif naming:
                name.append(token)
            elif inside:
                text.add_token(token)
                if segment := text.last_segment:
                    yield Delta(channel, segment, recipient)
        if inside and (tail := _tail(text)):
            yield Delta(channel, tail, recipient)


def _recipient(header: Iterable[str]) -> str | None:
    """Return the name behind `to=` in a header, which may be glued to what follows."""
    names = (word.removeprefix("to=") for word in header if word.startswith("to="))
    return next((name.partition("<|")[0] for name in names), None)


def _tail(text: Any) -> str:
    text.finalize()
    return str(text.last_segment)
