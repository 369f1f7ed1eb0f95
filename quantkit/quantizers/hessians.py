"""The Hessians of weights: sums over their inputs, and the prior that fills in for rare inputs.

A Hessian H is the mean of x x^T over the inputs x of a weight. The experts of a mixture see few
inputs for their width, so theirs is shrunk: towards the inputs of all experts, which share much of
their structure, and towards its own diagonal, which few inputs determine well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.backend import mx
from quantkit.backend.memory_limits import memory_limits
from quantkit.streaming.layer_trace import ModuleCall

_COPIES = 6  # of a Hessian, while it is factored


@dataclass(frozen=True)
class Prior:
    """The weights of the pooled inputs and of the diagonal, as multiples of the input width."""

    pooled: float
    diagonal: float


DEFAULT_PRIOR = Prior(3, 3)
PRIORS = (DEFAULT_PRIOR, Prior(12, 3), Prior(3, 1), Prior(0.25, 3))


def shrunk(total: mx.array, count: int, pooled: mx.array, prior: Prior) -> mx.array:
    """Return (S + a w P + b w diag(S) / n) / (n + (a + b) w), the Hessian (w, w) of a matrix.

    S = `total` (w, w) is the sum over its n = `count` inputs, P = `pooled` (w, w) the mean over
    those of all matrices, a and b are the weights of `prior`.
    """
    width = total.shape[-1]
    diagonal = mx.diag(mx.diagonal(total)) * (prior.diagonal * width / max(1, count))
    weight = count + (prior.pooled + prior.diagonal) * width
    return (total + prior.pooled * width * pooled + diagonal) / weight


def objective(weight: mx.array, values: mx.array, hessian: mx.array) -> mx.array:
    """Return (w - v) H (w - v)^T summed over the rows, for every matrix of a stack.

    `weight` and `values` are (..., out, in), `hessian` is (..., in, in), the result (...).
    """
    return row_objective(weight, values, hessian).sum(axis=(-2, -1))


def row_objective(weight: mx.array, values: mx.array, hessian: mx.array) -> mx.array:
    """Return (w - v) H (w - v)^T (..., out, 1) for every row, shaped as for `objective`."""
    d = weight - values
    return ((d @ hessian) * d).sum(axis=-1, keepdims=True)


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

    `counts` (matrices,) are the inputs of each matrix, `pooled` (in, in) is the sum over the inputs
    of all, `pooled_count` their number. Sums of all matrices stay in memory if they fit; otherwise
    the inputs wait in `spool`, or only the sums of the matrices `only` are kept.
    """

    def __init__(
        self, matrices: int, spool: Spool | None = None, only: Sequence[int] | None = None
    ) -> None:
        self.counts = np.zeros(matrices, np.int64)
        self.pooled, self.pooled_count = mx.zeros(()), 0
        self._only, self._spool = only, spool
        self._totals: dict[int, mx.array] = {}
        self._starts: list[np.ndarray] = []  # of every matrix's rows in each spooled chunk

    def add(self, call: ModuleCall) -> None:
        """Add the inputs of one call of the weight."""
        x, experts = inputs_of(call)
        if experts is None:
            starts = np.array([0, len(x)])
        else:
            order = np.argsort(experts, kind="stable")
            x = mx.take(x, mx.array(order), axis=0)
            starts = np.searchsorted(experts[order], np.arange(len(self.counts) + 1))
        self.counts += np.diff(starts)
        kept = self._kept(x.shape[-1])
        for i in kept:
            total = _gram(x[int(starts[i]) : int(starts[i + 1])])
            self._totals[i] = self._totals[i] + total if i in self._totals else total
        if self._only is None:
            first, *others = self._totals.values() if kept else (self.pooled, _gram(x))
            self.pooled = sum(others, start=first)
            self.pooled_count += len(x)
        if not kept and self._spool is not None:
            self._spool.append(x)
            self._starts.append(starts)
        mx.eval(self.pooled, self._totals)

    def _kept(self, width: int) -> Sequence[int]:
        """Return the matrices whose sums are kept in memory."""
        if self._only is not None:
            return self._only
        return range(len(self.counts)) if batch_size(width) >= len(self.counts) else ()

    def total(self, matrix: int) -> mx.array:
        """Return the sum (in, in) of x x^T over the inputs of a matrix."""
        if matrix in self._totals:
            return self._totals[matrix]
        total = mx.zeros_like(self.pooled)
        if self._spool is not None:
            for chunk, starts in enumerate(self._starts):
                start, stop = int(starts[matrix]), int(starts[matrix + 1])
                total = total + _gram(self._spool.read(chunk, start, stop))
                mx.eval(total)
        return total

    def hessian(self, matrix: int, prior: Prior) -> mx.array:
        """Return the shrunk Hessian (in, in) of a matrix; without inputs, the pooled one."""
        return self._shrunk(matrix, self.total(matrix), prior)

    def hessians_of(self, matrices: Sequence[int], priors: Sequence[Prior]) -> Iterator[mx.array]:
        """Yield the Hessians (matrices, in, in) under each prior; their inputs are read once."""
        totals = [self.total(matrix) for matrix in matrices]
        for prior in priors:
            pairs = zip(matrices, totals, strict=True)
            yield mx.stack([self._shrunk(matrix, total, prior) for matrix, total in pairs])

    def _shrunk(self, matrix: int, total: mx.array, prior: Prior) -> mx.array:
        pooled = self.pooled / max(1, self.pooled_count)
        hessian = shrunk(total, int(self.counts[matrix]), pooled, prior)
        mx.eval(hessian)
        return hessian

    def hessians(self, prior: Prior = DEFAULT_PRIOR) -> Iterator[tuple[slice, mx.array]]:
        """Yield (matrices, their Hessians (matrices, in, in)) in batches that fit in memory."""
        batch = batch_size(self.pooled.shape[-1])
        for start in range(0, len(self.counts), batch):
            some = slice(start, min(start + batch, len(self.counts)))
            yield some, mx.stack([self.hessian(i, prior) for i in range(some.start, some.stop)])


def _gram(rows: mx.array) -> mx.array:
    return rows.T @ rows


def batch_size(width: int) -> int:
    """Return how many Hessians (width, width) are factored at once."""
    return max(1, memory_limits().hessian_bytes // (_COPIES * 4 * width * width))


class Hessians:
    """The Hessians (matrices, in, in) of weights with shared inputs, and a cache of their factors.

    `importance` (matrices, in) is the diagonal; `factors` are cached by group size.
    """

    def __init__(self, hessian: mx.array) -> None:
        self.hessian = hessian
        self.importance = mx.diagonal(hessian, axis1=-2, axis2=-1)
        self.factors: dict[int, Any] = {}


def inputs_of(call: ModuleCall) -> tuple[mx.array, np.ndarray | None]:
    """Return the inputs (n, in) of a call in float32, and for a stack their experts (n), else
    None.
    """
    x = call.args[0]
    width = x.shape[-1]
    experts = None
    if len(call.args) > 1:
        indices = call.args[1]
        x = mx.broadcast_to(x, (*indices.shape, 1, width)) if x.ndim > 3 else x
        experts = np.array(indices).reshape(-1)
    return x.reshape(-1, width).astype(mx.float32), experts


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


def stacked(values: mx.array) -> mx.array:
    """Return `values` (..., out, in) as a stack: a plain matrix becomes (1, out, in)."""
    return values if values.ndim > 2 else values[None]
