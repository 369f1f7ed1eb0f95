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
    """Some new text of one channel; a model without channels has only the final one."""

    channel: str
    text: str


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
        channel, inside, naming = FINAL, True, False
        for token in tokens:
            if self.has_channels and (
                token in (self._channel, self._message) or token in self._ends
            ):
                if inside and (tail := _tail(text)):
                    yield Delta(channel, tail)
                text.reset()
                if token == self._message:
                    if naming:
                        channel = next(iter(self._tokenizer.decode(name).split()), FINAL)
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
                    yield Delta(channel, segment)
        if inside and (tail := _tail(text)):
            yield Delta(channel, tail)


def _tail(text: Any) -> str:
    text.finalize()
    return str(text.last_segment)
