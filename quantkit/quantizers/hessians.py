"""What the weights of a layer see: their inputs, and the Hessians made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.backend import mx
from quantkit.streaming.layer_trace import Step

_HESSIAN_BYTES = 1_500_000_000  # of the matrices in memory at a time; there are about six of each
_COPIES = 6
_SHRINK = 0.25  # tokens of the pooled Hessian that an expert is given, over the input's width


@dataclass(frozen=True)
class Inputs:
    """The inputs (n, in) of a weight, and for a stack which expert each goes to (n), else None."""

    x: mx.array
    experts: np.ndarray | None

    def hessians(self, count: int) -> Iterator[tuple[slice, mx.array]]:
        """(experts, their Hessians (experts, in, in)) in batches that fit in memory; one Hessian
        for a plain matrix.

        H is the mean of x x^T. An expert's own is shrunk towards that of all inputs, the more so
        the fewer it saw; one that saw none has that of all.
        """
        x = self.x.astype(mx.float32)
        width = x.shape[-1]
        pooled = x.T @ x / max(1, len(x))
        if self.experts is None:
            yield slice(0, 1), pooled[None]
            return
        prior = _SHRINK * width
        batch = max(1, _HESSIAN_BYTES // (_COPIES * 4 * width * width))
        for start in range(0, count, batch):
            part = slice(start, min(start + batch, count))
            found = []
            for expert in range(part.start, part.stop):
                rows = np.flatnonzero(self.experts == expert)
                own = mx.take(x, mx.array(rows), axis=0) if len(rows) else x[:0]
                total = own.T @ own if len(rows) else mx.zeros_like(pooled)
                found.append((total + prior * pooled) / (len(rows) + prior))
                mx.eval(found[-1])
            yield part, mx.stack(found)


def inputs_of(name: str, traces: Sequence[Sequence[Step]]) -> Inputs:
    """The inputs of the weight `name` in the calls of one layer, all batches together."""
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


def has_inputs(weight: Weight, steps: Sequence[Step]) -> bool:
    """Whether the inputs of `weight` are known: it is called, and if it is a stack, with the
    experts that each input goes to."""
    called = [step for step in steps if step.name == weight.name]
    return bool(called) and (len(weight.shape) == 2 or len(called[0].args) > 1)


def shared_inputs(names: Sequence[str], steps: Sequence[Step]) -> list[list[str]]:
    """`names` in groups that are called with the very same arrays: a query, key and value; gate and
    up. They share Hessians."""
    groups: list[tuple[Step, list[str]]] = []
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
    """A plain matrix as a stack of one."""
    return values if values.ndim > 2 else values[None]
