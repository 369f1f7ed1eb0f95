"""What calibrated quantizers lose, next to rounding to nearest, on inputs that they did not see.

A profile rounds to nearest; its predictions for another quantizer are corrected by the ratio of
their losses, role by role and tier by tier. A sample suffices: a few rows of two experts, in two
layers, and of the head. Hessians need more text than a profile, whose forward pass reads it, too.
They are made from most of its sequences, and the losses taken on others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.backend import free_memory, mx
from quantkit.formats.affine import AffineWeight
from quantkit.formats.codec import fake_quantize
from quantkit.formats.tiers import Tier
from quantkit.quantizers.choose_prior import sampled_matrices, sampled_rows
from quantkit.quantizers.hessians import DEFAULT_PRIOR, Hessians, batch_size, stacked
from quantkit.quantizers.input_sums import Inputs, InputSums, MemorySpool, shared_inputs
from quantkit.quantizers.matrix import scales_dtype
from quantkit.quantizers.registry import QUANTIZERS, Quantizer
from quantkit.sensitivity.entries import Entry
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import LayerTrace, hooked
from quantkit.streaming.weight_loader import Call

_MATRICES = 2  # of a stack
_LAYERS = 2
_HEAD_ROWS = 4096
_UNSEEN = 5  # one of so many sequences is left for the losses: of each kind of text in its turn

Losses = dict[tuple[str, str, str], float]
"""(quantizer, role, tier) -> the loss, summed over samples."""

SequenceInputs = tuple[Inputs, np.ndarray]
"""Inputs (n, in), and the number of the sequence (n,) of each."""


def sampled_layers(count: int) -> set[int]:
    """Return the numbers of a few of `count` layers, evenly spread."""
    return {(2 * i + 1) * count // (2 * _LAYERS) for i in range(min(_LAYERS, count))}


def head_losses(model: StreamingModel, h: mx.array, entries: Sequence[Entry]) -> Losses:
    """Return the losses in rows of the head, for outputs `h` (sequences, length, hidden) of the
    last layer.
    """
    head = model.head_weight
    of_head = [entry for entry in entries if entry.weight.name == head.name]
    if not of_head:
        return {}
    x = model.head_input(h)
    inputs = Inputs.of((x,)), np.repeat(np.arange(len(x)), x.shape[1])

    def rows(name: str) -> mx.array:
        return model.values(name, 0, min(_HEAD_ROWS, head.shape[0]))

    return sampled_losses([head], rows, of_head, [inputs])


def layer_losses(
    model: StreamingModel, number: int, call: Call, entries: Sequence[Entry]
) -> Losses:
    """Return the losses on samples of all weights of a layer, for its call."""
    layer = model.layers[number]
    weights = {n: w for n, w in model.weights.items() if n.startswith(f"{layer.path}.")}
    stacks = [name for name, weight in weights.items() if len(weight.shape) > 2]
    names = list(dict.fromkeys(e.weight.name for e in entries if e.weight.name in weights))
    losses: Losses = {}
    with hooked(layer, list(weights), stacks) as module:
        traces = [module.record(batch) for batch in call.batches()]
        for group in shared_inputs(names, traces[0].steps):
            together = [weights[name] for name in group]
            inputs = inputs_of(together[0], traces)
            add_losses(losses, sampled_losses(together, model.values, entries, inputs))
            free_memory()
    return losses


def add_losses(total: Losses, more: Losses) -> None:
    """Add the losses on `more` samples to `total`."""
    for key, loss in more.items():
        total[key] = total.get(key, 0.0) + loss


def sampled_losses(
    weights: Sequence[Weight],
    values: Callable[[str], mx.array],
    entries: Iterable[Entry],
    inputs: Iterable[SequenceInputs],
) -> Losses:
    """Return the losses of all quantizers on rows of `weights`, which share their inputs.

    `values` returns the values (..., out, in) of a weight by name. Empty for too few inputs.
    """
    first = weights[0]
    seen, unseen = _split(first.shape[0] if len(first.shape) > 2 else 1, inputs)
    width = min(_MATRICES, batch_size(first.shape[-1]))
    matrices = [m for m in sampled_matrices(len(unseen.counts)) if unseen.counts[m]][:width]
    if not matrices or not seen.pooled_count:
        return {}
    (moments,) = seen.moments_of(matrices, [DEFAULT_PRIOR])
    hessians = Hessians(moments)
    judge = Hessians(mx.stack([unseen.total(m) for m in matrices]))
    rows = {w.name: sampled_rows(stacked(values(w.name)), matrices) for w in weights}
    by_tier: dict[Tier, list[Weight]] = {}
    for entry in entries:
        if entry.weight in weights and entry.tier.mode == "affine":
            by_tier.setdefault(entry.tier, []).append(entry.weight)
    losses: Losses = {}
    for tier, of_tier in by_tier.items():
        together = mx.concatenate([rows[weight.name] for weight in of_tier], axis=-2)
        for quantizer in QUANTIZERS.values():
            rounded = _rounded(quantizer, together, hessians, tier, scales_dtype(first))
            start = 0
            for weight in of_tier:
                stop = start + rows[weight.name].shape[-2]
                loss = judge.loss(rows[weight.name], rounded[..., start:stop, :])
                losses[quantizer.name, weight.role, tier.name] = float(np.array(loss).sum())
                start = stop
    return losses


def _rounded(
    quantizer: Quantizer, rows: mx.array, hessians: Hessians, tier: Tier, dtype: mx.Dtype
) -> mx.array:
    if not quantizer.calibrated:
        return fake_quantize(rows, tier)
    quantized: AffineWeight = quantizer.function()(rows, hessians, tier, dtype)
    return quantized.dequantized(tier)


def inputs_of(weight: Weight, traces: Sequence[LayerTrace]) -> Iterator[SequenceInputs]:
    """Yield the inputs of a weight in `traces`; none where their tokens are not known."""
    before = 0  # sequences
    for trace in traces:
        batch, length = trace.y.shape[:2]
        for step in trace.calls_of(weight.name):
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
        left = sequences % _UNSEEN == 1
        for some, sums in ((~left, seen), (left, unseen)):
            (kept,) = np.nonzero(some)
            if len(kept):
                sums.add(every.at(kept))
    return seen, unseen
