"""The inputs of the weights of a layer, and their Hessians."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.backend import mx
from quantkit.backend.memory_limits import memory_limits
from quantkit.streaming.layer_trace import ModuleCall

_COPIES = 6  # of a Hessian, while it is factored
_SHRINK = 0.25  # weight of the pooled Hessian, in tokens over the width of the input


@dataclass(frozen=True)
class Inputs:
    """The inputs `x` (n, in) of a weight, and for a stack their `experts` (n), else None."""

    x: mx.array
    experts: np.ndarray | None

    def hessians(self, count: int) -> Iterator[tuple[slice, mx.array]]:
        """Yield (experts, their Hessians (experts, in, in)) in batches that fit in memory.

        A plain matrix has one Hessian. H is the mean of x x^T. The Hessian of an expert is shrunk
        towards the pooled one of all inputs, and equals it if the expert received no token.
        """
        x = self.x.astype(mx.float32)
        width = x.shape[-1]
        pooled = x.T @ x / max(1, len(x))
        if self.experts is None:
            yield slice(0, 1), pooled[None]
            return
        prior = _SHRINK * width
        batch = max(1, memory_limits().hessian_bytes // (_COPIES * 4 * width * width))
        for start in range(0, count, batch):
            some = slice(start, min(start + batch, count))
            batched = []
            for expert in range(some.start, some.stop):
                rows = np.flatnonzero(self.experts == expert)
                seen = mx.take(x, mx.array(rows), axis=0) if len(rows) else x[:0]
                total = seen.T @ seen if len(rows) else mx.zeros_like(pooled)
                batched.append((total + prior * pooled) / (len(rows) + prior))
                mx.eval(batched[-1])
            yield some, mx.stack(batched)


class Hessians:
    """The Hessians (matrices, in, in) of weights with shared inputs, and a cache of their factors.

    `importance` (matrices, in) is the diagonal; `factors` are cached by group size.
    """

    def __init__(self, hessian: mx.array) -> None:
        self.hessian = hessian
        self.importance = mx.diagonal(hessian, axis1=-2, axis2=-1)
        self.factors: dict[int, Any] = {}


def inputs_of(name: str, traces: Sequence[Sequence[ModuleCall]]) -> Inputs:
    """Return the inputs of the weight `name` in all calls of one layer."""
    xs, experts = [], []
    for steps in traces:
        for step in steps:
            if step.name != name:
                continue
            x = step.args[0]
            width = x.shape[-1]
            if len(step.args) > 1:
                indices = step.args[1]
                x = mx.broadcast_to(x, (*indices.shape, 1, width)) if x.ndim > 3 else x
                experts.append(np.array(indices).reshape(-1))
            xs.append(x.reshape(-1, width))
    return Inputs(mx.concatenate(xs), np.concatenate(experts) if experts else None)


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
