"""Modules whose weights are in memory only during a call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.backend import free_memory, mx
from quantkit.backend.memory_limits import memory_limits
from quantkit.formats.codec import fake_quantize
from quantkit.formats.tiers import Tier

Rows = Callable[[str, int, int], mx.array]
"""(weight or bias, first row, last row) -> values (rows, width) in their stored float type."""


@dataclass(frozen=True)
class Call:
    """The call of a layer: its input `x` (batch, tokens, hidden), masks and caches."""

    x: mx.array
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def batches(self) -> "Iterator[Call]":
        """Yield the same call for a few sequences at a time."""
        sequences = max(1, memory_limits().tokens // self.x.shape[1])
        for start in range(0, len(self.x), sequences):
            yield replace(self, x=self.x[start : start + sequences])


class StreamedModule:
    """A module whose weights are in memory only during a call.

    Other attributes are those of the module.
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
        """Fetch the weights, and return the evaluated output (batch, tokens, hidden)."""
        with self.loaded():
            outputs = []
            for batch in call.batches():
                outputs.append(self.module(batch.x, *batch.args, **batch.kwargs))
                mx.eval(outputs[-1])
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    @contextmanager
    def loaded(self) -> Iterator[Any]:
        """Keep the weights in memory for a while; nests."""
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


StoredRows = Tier | Callable[[int, int], mx.array]
"""A tier to round rows to, or a function that returns the values (rows, hidden) of the rows from a
first to a last one."""


class VocabularyTable(StreamedModule):
    """An embedding or a head: one row per token of the vocabulary, read when needed.

    `rows` are the rows of which a head gives logits, `stored` what takes the place of their values,
    and `last_input` (..., hidden) the input of the last product.
    """

    def __init__(self, module: Any, weight: Weight, read: Rows) -> None:
        super().__init__(module, weight.name, lambda _: {})
        self.weight = weight
        self.rows = range(weight.shape[0])
        self.stored: StoredRows | None = None
        self.last_input = mx.zeros(0)
        self._read = read

    @contextmanager
    def restricted(self, rows: range, stored: StoredRows | None) -> Iterator[None]:
        """Use other `rows` and other `stored` values for a while."""
        before = self.rows, self.stored
        self.rows, self.stored = rows, stored
        try:
            yield
        finally:
            self.rows, self.stored = before

    def as_linear(self, x: mx.array) -> mx.array:
        """Return logits (..., rows) for `x` (..., hidden)."""
        self.last_input = x
        step = max(1, memory_limits().block_values // self.weight.shape[1])
        blocks = []
        for start in range(self.rows.start, self.rows.stop, step):
            stop = min(start + step, self.rows.stop)
            block = x @ self._values(start, stop).T
            if "bias" in self.module:
                block = block + self._read("bias", start, stop).reshape(-1).astype(mx.float32)
            mx.eval(block)
            blocks.append(block)
        return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=-1)

    def _values(self, start: int, stop: int) -> mx.array:
        if callable(self.stored):
            return self.stored(start, stop)
        values = self._read("weight", start, stop)
        return fake_quantize(values, self.stored) if self.stored else values.astype(mx.float32)


class Head(VocabularyTable):
    """An output head."""

    def __call__(self, x: mx.array, *_: Any, **__: Any) -> mx.array:
        """Return logits (..., rows) for `x` (..., hidden)."""
        return self.as_linear(x)


class Embedding(VocabularyTable):
    """An embedding, which a tied model also uses as its head."""

    def __init__(self, module: Any, weight: Weight, read: Rows) -> None:
        super().__init__(module, weight, read)
        self._offset: mx.array | None = None

    def __call__(self, x: mx.array, *_: Any, **__: Any) -> mx.array:
        """Return the rows (..., hidden) of the tokens `x` (...), in float32."""
        ids, places = np.unique(np.array(x), return_inverse=True)
        rows = mx.concatenate([self._values(i, i + 1) for i in ids.tolist()])
        embedded = rows[mx.array(places.reshape(x.shape))]
        if self._offset is not None and self._offset.shape == embedded.shape:
            return embedded + self._offset
        return embedded

    @contextmanager
    def shifted(self, offset: mx.array) -> Iterator[None]:
        """Add `offset` (batch, tokens, hidden) to the embedded tokens for a while."""
        self._offset = offset
        try:
            yield
        finally:
            self._offset = None
