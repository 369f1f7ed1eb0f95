"""Sums over the inputs of weights, from which their Hessians are made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.backend import mx
from quantkit.quantizers.hessians import DEFAULT_PRIOR, Prior, batch_size, shrunk
from quantkit.streaming.layer_trace import ModuleCall


@dataclass(frozen=True)
class Inputs:
    """Inputs `x` (n, in) of a weight in float32; for a stack, their `experts` (n,)."""

    x: mx.array
    experts: np.ndarray | None = None

    @classmethod
    def of(cls, args: Sequence[Any]) -> "Inputs":
        """Return the inputs in the arguments of a call of a weight's module."""
        x = args[0]
        width = x.shape[-1]
        experts = None
        if len(args) > 1:
            indices = args[1]
            x = mx.broadcast_to(x, (*indices.shape, 1, width)) if x.ndim > 3 else x
            experts = np.array(indices).reshape(-1)
        return cls(x.reshape(-1, width).astype(mx.float32), experts)

    def at(self, places: np.ndarray) -> "Inputs":
        """Return the inputs at some `places` (m,)."""
        experts = None if self.experts is None else self.experts[places]
        return Inputs(self.x[mx.array(places)], experts)


class Spool(Protocol):
    """Keeps inputs that do not fit in memory as sums: rows (n, width), chunk by chunk."""

    def append(self, rows: mx.array) -> None:
        """Keep the rows (n, width) of one more chunk."""

    def read(self, chunk: int, start: int, stop: int) -> mx.array:
        """Return rows (stop - start, width) of a chunk."""
        ...


class MemorySpool:
    """A spool in memory."""

    def __init__(self) -> None:
        self._chunks: list[mx.array] = []

    def append(self, rows: mx.array) -> None:
        """Keep the rows (n, width) of one more chunk."""
        self._chunks.append(rows)

    def read(self, chunk: int, start: int, stop: int) -> mx.array:
        """Return rows (stop - start, width) of a chunk."""
        return self._chunks[chunk][start:stop]


class DiskSpool:
    """A spool in a file, which is overwritten."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sizes: list[int] = []  # in rows
        path.write_bytes(b"")

    def append(self, rows: mx.array) -> None:
        """Keep the rows (n, width) of one more chunk, in float32."""
        self._width = rows.shape[-1]
        self._sizes.append(len(rows))
        with open(self._path, "ab") as file:
            file.write(np.array(rows, np.float32).data)

    def read(self, chunk: int, start: int, stop: int) -> mx.array:
        """Return rows (stop - start, width) of a chunk."""
        offset = 4 * self._width * (sum(self._sizes[:chunk]) + start)
        count = (stop - start) * self._width
        rows = np.fromfile(self._path, np.float32, count, offset=offset)
        return mx.array(rows.reshape(-1, self._width))

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)


class InputSums:
    """Sums of x x^T over the inputs of the `matrices` of a weight, added call by call.

    Where the native model's inputs are known as well, sums of (x_native - x) x^T stand below them:
    totals are (in, in) or (2 in, in). `counts` (matrices,) are the inputs of each matrix, `pooled`
    is the sum over the inputs of all, `pooled_count` their number. Sums of all matrices stay in
    memory if they fit; otherwise the inputs wait in `spool`, or only the sums of the matrices
    `only` are kept.
    """

    def __init__(
        self, matrices: int, spool: Spool | None = None, only: Sequence[int] | None = None
    ) -> None:
        self.counts = np.zeros(matrices, np.int64)
        self.pooled, self.pooled_count = mx.zeros(()), 0
        self._only, self._spool = only, spool
        self._totals: dict[int, mx.array] = {}
        self._starts: list[np.ndarray] = []  # of every matrix's rows in each spooled chunk

    def add(self, inputs: Inputs, native: mx.array | None = None) -> None:
        """Add the inputs of one call of the weight, and the `native` (n, in) that they stand for.

        All calls have native inputs, or none has.
        """
        width, rows = inputs.x.shape[-1], inputs.x
        if native is not None:
            rows = mx.concatenate([rows, native - rows], axis=-1)
        if inputs.experts is None:
            starts = np.array([0, len(rows)])
        else:
            order = np.argsort(inputs.experts, kind="stable")
            rows = mx.take(rows, mx.array(order), axis=0)
            starts = np.searchsorted(inputs.experts[order], np.arange(len(self.counts) + 1))
        self.counts += np.diff(starts)
        kept = self._kept(width)
        for i in kept:
            total = _products(rows[int(starts[i]) : int(starts[i + 1])], width)
            self._totals[i] = self._totals[i] + total if i in self._totals else total
        if self._only is None:
            first, *others = (
                self._totals.values() if kept else (self.pooled, _products(rows, width))
            )
            self.pooled = sum(others, start=first)
            self.pooled_count += len(rows)
        if not kept and self._spool is not None:
            self._spool.append(rows)
            self._starts.append(starts)
        mx.eval(self.pooled, self._totals)

    def _kept(self, width: int) -> Sequence[int]:
        """Return the matrices whose sums are kept in memory."""
        if self._only is not None:
            return self._only
        return range(len(self.counts)) if batch_size(width) >= len(self.counts) else ()

    def total(self, matrix: int) -> mx.array:
        """Return the sums (in or 2 in, in) over the inputs of a matrix."""
        if matrix in self._totals:
            return self._totals[matrix]
        total = mx.zeros_like(self.pooled)
        if self._spool is not None:
            for chunk, starts in enumerate(self._starts):
                start, stop = int(starts[matrix]), int(starts[matrix + 1])
                rows = self._spool.read(chunk, start, stop)
                total = total + _products(rows, total.shape[-1])
                mx.eval(total)
        return total

    def moments_of(self, matrices: Sequence[int], priors: Sequence[Prior]) -> Iterator[mx.array]:
        """Yield the shrunk means (matrices, in or 2 in, in) under each prior.

        Inputs are read once. A matrix without inputs has the pooled means.
        """
        totals = [self.total(matrix) for matrix in matrices]
        for prior in priors:
            pairs = zip(matrices, totals, strict=True)
            yield mx.stack([self._shrunk(matrix, total, prior) for matrix, total in pairs])

    def _shrunk(self, matrix: int, total: mx.array, prior: Prior) -> mx.array:
        pooled = self.pooled / max(1, self.pooled_count)
        moments = shrunk(total, int(self.counts[matrix]), pooled, prior)
        mx.eval(moments)
        return moments

    def moments(self, prior: Prior = DEFAULT_PRIOR) -> Iterator[tuple[slice, mx.array]]:
        """Yield (matrices, their shrunk means (matrices, in or 2 in, in)) in batches that fit in
        memory.
        """
        batch = batch_size(self.pooled.shape[-1])
        for start in range(0, len(self.counts), batch):
            some = slice(start, min(start + batch, len(self.counts)))
            (moments,) = self.moments_of(range(some.start, some.stop), [prior])
            yield some, moments


def _products(rows: mx.array, width: int) -> mx.array:
    """Return the sum over `rows` (n, width or more) of their products with the first `width`."""
    return rows.T @ rows[:, :width]


def has_inputs(weight: Weight, steps: Sequence[ModuleCall]) -> bool:
    """Return whether `weight` is called, and for a stack, with the experts of each input."""
    called = [step for step in steps if step.name == weight.name]
    return bool(called) and (len(weight.shape) == 2 or len(called[0].args) > 1)


def shared_inputs(names: Sequence[str], steps: Sequence[ModuleCall]) -> list[list[str]]:
    """Group `names` by identical inputs, such as query, key and value: they share Hessians."""
    groups: list[tuple[ModuleCall, list[str]]] = []
    for step in steps:
        if step.name not in names:
            continue
        for first, group in groups:
            if step.is_sibling(first):
                group.append(step.name)
                break
        else:
            groups.append((step, [step.name]))
    return [group for _, group in groups]
