"""What calibrated quantizers lose, next to rounding to nearest, on inputs that they did not see.

A profile rounds to nearest; its predictions for another quantizer are corrected by the ratio of
their losses, role by role and tier by tier. A sample suffices: a few rows of a few experts, in a
few layers. The Hessians are made from most sequences of the text, the losses taken on others.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.backend import mx
from quantkit.formats.affine import AffineWeight
from quantkit.formats.codec import fake_quantize
from quantkit.formats.tiers import Tier
from quantkit.quantizers.choose_prior import sampled_matrices
from quantkit.quantizers.hessians import DEFAULT_PRIOR, Hessians, batch_size, stacked
from quantkit.quantizers.input_sums import Inputs, InputSums, MemorySpool
from quantkit.quantizers.matrix import scales_dtype
from quantkit.quantizers.registry import QUANTIZERS
from quantkit.streaming.layer_trace import LayerTrace

_ROWS = 64  # of a matrix
_LAYERS = 3
_UNSEEN = 4  # one of so many sequences is left to take the losses on

Losses = dict[tuple[str, str, str], float]
"""(quantizer, role, tier) -> the loss, summed over samples."""

SequenceInputs = tuple[Inputs, np.ndarray]
"""Inputs (n, in), and the number of the sequence (n,) of each."""


def sampled_layers(count: int) -> set[int]:
    """Return the numbers of a few of `count` layers, evenly spread."""
    return {(2 * i + 1) * count // (2 * _LAYERS) for i in range(min(_LAYERS, count))}


def sampled_losses(
    weight: Weight, values: mx.array, tiers: Iterable[Tier], inputs: Iterable[SequenceInputs]
) -> Losses:
    """Return the losses of all quantizers on rows of a weight.

    `values` are (..., out, in). Empty if there are too few inputs.
    """
    stack = stacked(values)
    seen, unseen = _split(len(stack), inputs)
    matrices = [m for m in sampled_matrices(len(stack)) if unseen.counts[m]]
    matrices = matrices[: batch_size(stack.shape[-1])]
    if not matrices or not seen.pooled_count:
        return {}
    rows = stack[mx.array(matrices), :: max(1, stack.shape[-2] // _ROWS)].astype(mx.float32)
    (moments,) = seen.moments_of(matrices, [DEFAULT_PRIOR])
    hessians, dtype = Hessians(moments), scales_dtype(weight)
    judge = Hessians(mx.stack([unseen.total(m) for m in matrices]))
    losses: Losses = {}
    for tier in (tier for tier in tiers if tier.mode == "affine"):
        for quantizer in QUANTIZERS.values():
            if quantizer.calibrated:
                quantized: AffineWeight = quantizer.function()(rows, hessians, tier, dtype)
                rounded = quantized.dequantized(tier)
            else:
                rounded = fake_quantize(rows, tier)
            loss = float(np.array(judge.loss(rows, rounded)).sum())
            losses[quantizer.name, weight.role, tier.name] = loss
    return losses


def inputs_of(weight: Weight, traces: Sequence[LayerTrace]) -> Iterator[SequenceInputs]:
    """Yield the inputs of a weight in `traces`; none where their tokens are not known."""
    before = 0  # sequences
    for trace in traces:
        batch, length = trace.y.shape[:2]
        for step in (step for step in trace.steps if step.name == weight.name):
            if len(weight.shape) > 2:
                tokens = trace.token_of_rows(step)
            else:
                tokens = mx.arange(batch * length) if step.args[0].ndim == 3 else None
            if tokens is not None:
                yield Inputs.of(step.args), before + np.array(tokens) // length
        before += batch


def _split(matrices: int, inputs: Iterable[SequenceInputs]) -> tuple[InputSums, InputSums]:
    """Return the sums over the inputs of most sequences, and over those of the others."""
    seen, unseen = InputSums(matrices, MemorySpool()), InputSums(matrices, MemorySpool())
    for every, sequences in inputs:
        left = sequences % _UNSEEN == _UNSEEN - 1
        for some, sums in ((~left, seen), (left, unseen)):
            (kept,) = np.nonzero(some)
            experts = None if every.experts is None else every.experts[kept]
            if len(kept):
                sums.add(Inputs(every.x[mx.array(kept)], experts))
    return seen, unseen
