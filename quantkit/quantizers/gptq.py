"""The `gptq` quantizer: the rounding error of a column is compensated by the columns after it.

Follows Frantar et al. 2022 (arXiv 2210.17323), with groups in activation order. The scales of a
group come from the search, on the compensated weight; at the end, coordinate descent moves
integers, scales and biases to a minimum of the objective.
"""

from dataclasses import dataclass

import numpy as np

from quantkit.backend import mx
from quantkit.formats.affine import AffineWeight, grouped
from quantkit.formats.tiers import Tier
from quantkit.quantizers.descent import descend
from quantkit.quantizers.feedback import column_by_column
from quantkit.quantizers.hessians import Hessians
from quantkit.quantizers.search import nearest_scales, searched_scales

_DAMPING = 0.01  # of the mean diagonal


@dataclass(frozen=True)
class GptqFactors:
    """The factors of Hessians (..., in, in), whose groups of columns are taken in `order`.

    `importance` (..., in) is the diagonal, `upper` (..., in, in) is U with U^T U = (damped H)^-1.
    """

    order: tuple[int, ...]
    importance: mx.array
    upper: mx.array


def quantize(weight: mx.array, hessians: Hessians, tier: Tier, dtype: mx.Dtype) -> AffineWeight:
    """Quantize `weight` (matrices, out, in) in float32, its scales and biases stored as `dtype`."""
    cache: dict[int, GptqFactors] = hessians.factors
    if tier.group_size not in cache:
        cache[tier.group_size] = gptq_factors(hessians.hessian, tier.group_size)
    quantized = gptq(weight, cache[tier.group_size], tier, dtype)
    return descend(weight, hessians.hessian, quantized, tier)


def gptq_factors(hessian: mx.array, group_size: int, *, damping: float = _DAMPING) -> GptqFactors:
    """Factor Hessians (..., in, in), damped by a share of the mean diagonal.

    The groups with the largest inputs come first (activation order), in one order for all matrices.
    """
    groups = hessian.shape[-1] // group_size
    diagonal = mx.diagonal(hessian, axis1=-2, axis2=-1)
    sizes = np.array(diagonal.reshape(-1, groups, group_size).sum(axis=(0, 2)))
    order = tuple(np.argsort(-sizes, kind="stable").tolist())
    columns = mx.array([g * group_size + i for g in order for i in range(group_size)])
    hessian = mx.take(mx.take(hessian, columns, axis=-1), columns, axis=-2)
    diagonal = mx.take(diagonal, columns, axis=-1)
    shift = (damping * diagonal.mean(axis=-1) + 1e-10)[..., None, None]
    damped = hessian + shift * mx.eye(hessian.shape[-1])
    with mx.stream(mx.cpu):  # mlx factors on the CPU only
        inverse = mx.linalg.cholesky_inv(mx.linalg.cholesky(damped))
        upper = mx.linalg.cholesky(inverse, upper=True)
    mx.eval(upper, diagonal)
    return GptqFactors(order, diagonal, upper)


def gptq(weight: mx.array, factors: GptqFactors, tier: Tier, dtype: mx.Dtype) -> AffineWeight:
    """Quantize `weight` (..., out, in) in float32 column by column, without the descent."""
    size = tier.group_size
    order = factors.order
    w = mx.take(grouped(weight, tier), mx.array(order), axis=-2).reshape(weight.shape)
    qs: list[mx.array] = []
    scales, biases = [], []
    for _ in order:
        columns = slice(len(qs) * size, (len(qs) + 1) * size)
        block, upper = mx.contiguous(w[..., :size]), factors.upper[..., columns, :]
        h = factors.importance[..., None, None, columns]
        first = nearest_scales(block, tier, dtype)
        s, b = searched_scales(block[..., None, :], h, tier, dtype, first)
        q, errors = _through_group(block, upper[..., columns], s, b, tier)
        w = w[..., size:] - errors @ upper[..., columns.stop :]
        mx.eval(w, q, s, b)
        qs.append(q)
        scales.append(s)
        biases.append(b)
    places = sorted(range(len(order)), key=lambda place: order[place])
    q, s, b = (mx.concatenate([x[p] for p in places], axis=-1) for x in (qs, scales, biases))
    return AffineWeight(q.astype(mx.uint8), s, b)


def _through_group(
    block: mx.array, upper: mx.array, scales: mx.array, biases: mx.array, tier: Tier
) -> tuple[mx.array, mx.array]:
    """Quantize a group (..., out, size): return its integers, and its errors over U's diagonal."""
    s, b = (x.astype(mx.float32)[..., 0] for x in (scales, biases))
    safe = mx.where(s == 0, 1, s)
    diagonal = mx.diagonal(upper, axis1=-2, axis2=-1)[..., None, :]
    qs: list[mx.array] = []

    def step(i: int, w: mx.array) -> mx.array:
        qs.append(mx.clip(mx.round((w - b) / safe), 0, 2**tier.bits - 1))
        return (w - qs[-1] * s - b) / diagonal[..., i]

    errors = column_by_column(block, upper, step)
    return mx.stack(qs, axis=-1), errors
