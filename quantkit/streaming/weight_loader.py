"""Modules whose weights are in memory only while they are called."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.backend import free_memory, mx
from quantkit.formats.codec import rounded
from quantkit.formats.tiers import Tier

_TOKENS_AT_ONCE = 4096
BLOCK_VALUES = 32_000_000  # of a head, or of its logits, in memory at a time

Rows = Callable[[str, int, int], mx.array]
"""(weight or bias, first row, last row) -> values (rows, width) in their stored float type."""


@dataclass(frozen=True)
class Call:
    """What a layer was called with: its input (batch, tokens, hidden), and masks and caches."""

    x: mx.array
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def parts(self) -> "Iterator[Call]":
        """The same for a few sequences at a time."""
        sequences = max(1, _TOKENS_AT_ONCE // self.x.shape[1])
        for start in range(0, len(self.x), sequences):
            yield replace(self, x=self.x[start : start + sequences])


class StreamedModule:
    """A module whose weights are there only while it is called.

    Whatever else is asked of it is answered by the module.
    """

    def __init__(self, module: Any, path: str, fetch: Callable[[str], dict[str, mx.array]]) -> None:
        self.module = module
        self.path = path
        self._fetch = fetch
        self._depth = 0
        self.instead: Callable[[Call], mx.array] | None = None

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        call = Call(x, args, kwargs)
        return self.instead(call) if self.instead else self.run(call)

    def run(self, call: Call) -> mx.array:
        """The module's output, evaluated, its weights fetched and let go again."""
        with self.loaded():
            parts = []
            for part in call.parts():
                parts.append(self.module(part.x, *part.args, **part.kwargs))
                mx.eval(parts[-1])
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    @contextmanager
    def loaded(self) -> Iterator[Any]:
        """The module with its weights in memory; nests."""
        if self._depth == 0:
            self._empty = self.module.parameters()
            self.module.load_weights(list(self._fetch(self.path).items()))
        self._depth += 1
        try:
            yield self.module
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.module.update(self._empty)
                free_memory()


class Table(StreamedModule):
    """An embedding or a head: a row for every token of the vocabulary, read as they are needed.

    `rows` are those of which a head gives logits; `tier` is one to round its values to; `moved` is
    added to what is looked up; `heard` holds the input of the last call as a head.
    """

    def __init__(self, module: Any, weight: Weight, read: Rows) -> None:
        super().__init__(module, weight.name, lambda _: {})
        self.weight = weight
        self.rows = range(weight.shape[0])
        self.tier: Tier | None = None
        self.moved: mx.array | None = None
        self.heard: list[mx.array] = []
        self._read = read

    def __call__(self, x: mx.array, *_: Any, **__: Any) -> mx.array:
        return self.as_linear(x) if x.dtype == mx.float32 else self._look_up(x)

    @contextmanager
    def seen_as(self, rows: range, tier: Tier | None) -> Iterator[None]:
        """With other `rows` and `tier` for a while."""
        before = self.rows, self.tier
        self.rows, self.tier = rows, tier
        try:
            yield
        finally:
            self.rows, self.tier = before

    @contextmanager
    def moved_by(self, change: mx.array) -> Iterator[None]:
        """With `change` (batch, tokens, width) added to what is looked up of tokens."""
        self.moved = change
        try:
            yield
        finally:
            self.moved = None

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits (..., rows) for `x` (..., hidden)."""
        self.heard = [x]
        step = max(1, BLOCK_VALUES // self.weight.shape[1])
        parts = []
        for start in range(self.rows.start, self.rows.stop, step):
            stop = min(start + step, self.rows.stop)
            part = x @ self._values(start, stop).T
            if "bias" in self.module:
                part = part + self._read("bias", start, stop).reshape(-1).astype(mx.float32)
            mx.eval(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def _look_up(self, tokens: mx.array) -> mx.array:
        ids, places = np.unique(np.array(tokens), return_inverse=True)
        rows = mx.concatenate([self._values(i, i + 1) for i in ids.tolist()])
        found = rows[mx.array(places.reshape(tokens.shape))]
        if self.moved is not None and self.moved.shape == found.shape:
            return found + self.moved
        return found

    def _values(self, start: int, stop: int) -> mx.array:
        values = self._read("weight", start, stop)
        return rounded(values, self.tier) if self.tier else values.astype(mx.float32)
