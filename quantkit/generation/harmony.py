"""What a model says, told apart by channel.

gpt-oss wraps each of its messages as <|channel|> NAME <|message|> TEXT <|end|>: what it thinks in
the channel `analysis`, what it answers in `final`. They are told apart by token ids, not by text,
which could hold the same words.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

FINAL = "final"


@dataclass(frozen=True)
class Delta:
    """Some text of one channel; a model without channels has only the final one."""

    channel: str
    text: str


class Channels:
    """Splits a stream of token ids. `tokenizer` is mlx-lm's."""

    def __init__(self, tokenizer: Any) -> None:
        known = tokenizer.get_vocab()
        self._channel = known.get("<|channel|>")
        self._message = known.get("<|message|>")
        ends = ("<|start|>", "<|end|>", "<|return|>", "<|call|>")
        self._ends = {known[name] for name in ends if name in known}
        self._tokenizer = tokenizer

    @property
    def known(self) -> bool:
        """Whether the tokenizer has channels at all."""
        return self._channel is not None and self._message is not None

    def deltas(self, tokens: Iterable[int]) -> Iterator[Delta]:
        """The text of `tokens`, without the marks around it, as it comes.

        Text before the first mark is the final channel's, and so is that of a channel without a
        name; what stands between two messages (a role) is not text.
        """
        text = self._tokenizer.detokenizer
        text.reset()
        name: list[int] = []
        channel, inside, naming = FINAL, True, False
        for token in tokens:
            if self.known and (token in (self._channel, self._message) or token in self._ends):
                if inside and (rest := _rest(text)):
                    yield Delta(channel, rest)
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
        if inside and (rest := _rest(text)):
            yield Delta(channel, rest)


def _rest(text: Any) -> str:
    text.finalize()
    return str(text.last_segment)
