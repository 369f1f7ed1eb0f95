"""The choice of the prior of Hessians, by the objective on inputs that they were not made from.

A few experts, and a few rows of their weights, are quantized with every prior and with the search,
which needs no Hessian. The best choice on the validate split serves the whole stack.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantkit.backend import mx
from quantkit.formats.tiers import Tier
from quantkit.quantizers.hessians import (
    DEFAULT_PRIOR,
    PRIORS,
    Hessians,
    Prior,
    batch_size,
)
from quantkit.quantizers.input_sums import InputSums
from quantkit.quantizers.registry import DEFAULT_QUANTIZER, SEARCH, Quantizer, find_quantizer

_EXPERTS = 4  # of a stack
_ROWS = 64  # of a matrix


@dataclass(frozen=True)
class Choice:
    """A prior for the Hessians of a stack, and a quantizer."""

    prior: Prior
    quantizer: Quantizer


@dataclass(frozen=True)
class Sample:
    """A weight to quantize in part: its `values` (matrices, out, in), tier and scales' dtype."""

    values: mx.array
    tier: Tier
    dtype: mx.Dtype


def sampled_matrices(count: int) -> list[int]:
    """Return the numbers of a few matrices of a stack of `count`, evenly spread."""
    return sorted({i * count // min(_EXPERTS, count) for i in range(min(_EXPERTS, count))})


def sampled_rows(values: mx.array, matrices: Sequence[int]) -> mx.array:
    """Return a few rows (matrices, rows, in), evenly spread, of some of `values` (..., out, in).

    They are in float32.
    """
    step = max(1, values.shape[-2] // _ROWS)
    return values[mx.array(list(matrices)), ::step].astype(mx.float32)


def choose(
    samples: Sequence[Sample], inputs: InputSums, validation: InputSums, quantizer: Quantizer
) -> Choice:
    """Return the choice of least objective on the inputs of `validation`.

    The weights of `samples` share these inputs. Without inputs to validate on, and for a quantizer
    that uses no more than the diagonal, the default prior is as good as any.
    """
    default = Choice(DEFAULT_PRIOR, quantizer)
    if quantizer.name != DEFAULT_QUANTIZER:
        return default
    choices = [Choice(prior, quantizer) for prior in PRIORS]
    choices.append(Choice(DEFAULT_PRIOR, find_quantizer(SEARCH)))
    matrices = [m for m in sampled_matrices(len(inputs.counts)) if validation.counts[m]]
    losses = np.zeros(len(choices))
    step = max(1, batch_size(samples[0].values.shape[-1]) // len(PRIORS))
    for batch in (matrices[i : i + step] for i in range(0, len(matrices), step)):
        unseen = mx.stack([validation.total(m) for m in batch])
        moments = list(inputs.moments_of(batch, PRIORS))
        every = Hessians(mx.concatenate(moments))
        losses[:-1] += _losses(samples, batch, every, quantizer, unseen)
        losses[-1:] += _losses(samples, batch, Hessians(moments[0]), choices[-1].quantizer, unseen)
    return choices[int(losses.argmin())]


def _losses(
    samples: Sequence[Sample],
    matrices: list[int],
    hessians: Hessians,
    quantizer: Quantizer,
    unseen: mx.array,
) -> np.ndarray:
    """Return the losses (priors,) of some rows of the weights on inputs with sums `unseen`.

    `hessians` are those of all `matrices` under the first prior, then under the second, and so on:
    their columns go through the quantizer together.
    """
    priors = len(hessians.hessian) // len(matrices)
    validation = Hessians(mx.concatenate([unseen] * priors))
    quantize = quantizer.function()
    losses = np.zeros(priors)
    for sample in samples:
        rows = mx.concatenate([sampled_rows(sample.values, matrices)] * priors)
        quantized = quantize(hessians.target(rows), hessians, sample.tier, sample.dtype)
        errors = validation.loss(rows, quantized.dequantized(sample.tier))
        losses += np.array(errors).reshape(priors, -1).sum(axis=1)
    return losses
