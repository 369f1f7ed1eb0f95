"""The `gptq` quantizer: the rounding error of a column is compensated by the columns after it.

Follows Frantar et al. 2022 (arXiv 2210.17323). The scales of a group come from the search, on the
compensated weight; at the end a refit solves for all scales and biases of a row. The objective is
(w - v) H (w - v)^T for every row w and its quantized values v, H being the mean of x x^T over the
inputs x of the weight.
"""

from dataclasses import dataclass

import numpy as np

from quantkit.backend import mx
from quantkit.formats.affine import AffineWeight, grouped
from quantkit.formats.tiers import Tier
from quantkit.quantizers.hessians import Hessians
from quantkit.quantizers.search import nearest_scales, searched_scales

_DAMPING = 0.01  # of the mean diagonal
_SWEEPS = 6  # of the refit over the groups


@dataclass(frozen=True)
class GptqFactors:
    """The factors of Hessians (..., in, in), whose groups of columns are taken in `order`.

    `importance` (..., in) is the diagonal, `upper` (..., in, in) is U with U^T U = (damped H)^-1.
    """

    order: tuple[int, ...]
    importance: mx.array
    upper: mx.array


def quantize(weight: mx.array, hessians: Hessians, tier: Tier, dtype: mx.Dtype) -> AffineWeight:
    """Quantize `weight` (matrices, out, in) in float32, its scales and biases stored as `dtype`.

    Tries the groups in stored order and by the size of their inputs, and keeps the better result
    for every matrix.
    """
    hessian = hessians.hessian
    candidates = [
        refit(weight, hessian, gptq(weight, factors, tier, dtype), tier)
        for factors in _orders(hessians, tier.group_size)
    ]
    best = candidates[0]
    for other in candidates[1:]:
        before, after = (objective(weight, x.dequantized(tier), hessian) for x in (best, other))
        better = (after < before)[..., None, None]
        pairs = ((other.q, best.q), (other.scales, best.scales), (other.biases, best.biases))
        best = AffineWeight(*(mx.where(better, a, b) for a, b in pairs))
    return best


def _orders(hessians: Hessians, group_size: int) -> list[GptqFactors]:
    """Return the factors for both orders of the groups, one if the orders agree."""
    cache: dict[int, list[GptqFactors]] = hessians.factors
    if group_size not in cache:
        both = [gptq_factors(hessians.hessian, group_size, by_size=by) for by in (False, True)]
        cache[group_size] = both[: len({factors.order for factors in both})]
    return cache[group_size]


def gptq_factors(
    hessian: mx.array, group_size: int, *, by_size: bool = False, damping: float = _DAMPING
) -> GptqFactors:
    """Factor Hessians (..., in, in), damped by a share of the mean diagonal.

    `by_size` takes the groups with the largest inputs first (activation order), with one order for
    all experts; otherwise the order is the stored one.
    """
    groups = hessian.shape[-1] // group_size
    order = tuple(range(groups))
    diagonal = mx.diagonal(hessian, axis1=-2, axis2=-1)
    if by_size:
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
    """Quantize `weight` (..., out, in) in float32 column by column, without the refit."""
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
    qs, errors = [], []
    for i in range(block.shape[-1]):
        w = block[..., i]
        q = mx.clip(mx.round((w - b) / safe), 0, 2**tier.bits - 1)
        error = (w - q * s - b) / upper[..., i, i, None]
        block = block - error[..., None] * upper[..., None, i, :]
        qs.append(q)
        errors.append(error)
    return mx.stack(qs, axis=-1), mx.stack(errors, axis=-1)


def objective(weight: mx.array, values: mx.array, hessian: mx.array) -> mx.array:
    """Return (w - v) H (w - v)^T summed over the rows, for every matrix of a stack.

    `weight` and `values` are (..., out, in), `hessian` is (..., in, in), the result (...).
    """
    return _row_objective(weight, values, hessian).sum(axis=(-2, -1))


def _row_objective(weight: mx.array, values: mx.array, hessian: mx.array) -> mx.array:
    d = weight - values
    return ((d @ hessian) * d).sum(axis=-1, keepdims=True)


def refit(weight: mx.array, hessian: mx.array, quantized: AffineWeight, tier: Tier) -> AffineWeight:
    """Return the scales and biases of least objective for the integers of `quantized`.

    `weight` is (..., out, in), `hessian` (..., in, in). The scales and biases of a row solve one
    linear system, here by block Gauss-Seidel over the groups. Each is rounded to its stored dtype
    at once, so that later groups compensate for that, too. Rows without improvement keep theirs.
    """
    dtype = quantized.scales.dtype
    q = quantized.q.astype(mx.float32)
    pull = (weight - quantized.dequantized(tier)) @ hessian
    scales, biases = (
        list(mx.split(x.astype(mx.float32), x.shape[-1], axis=-1))
        for x in (quantized.scales, quantized.biases)
    )
    for _ in range(_SWEEPS):
        for g in range(len(scales)):
            columns = slice(g * tier.group_size, (g + 1) * tier.group_size)
            block = hessian[..., columns, columns]
            ds, db = _group_step(pull[..., columns], q[..., columns], block)
            s, b = (
                (x[g] + d).astype(dtype).astype(mx.float32) for x, d in ((scales, ds), (biases, db))
            )
            moved = q[..., columns] * (s - scales[g]) + (b - biases[g])
            pull = pull - moved @ hessian[..., columns, :]
            scales[g], biases[g] = s, b
            mx.eval(pull, s, b)
    fitted = AffineWeight(
        quantized.q,
        mx.concatenate(scales, axis=-1).astype(dtype),
        mx.concatenate(biases, axis=-1).astype(dtype),
    )
    before, after = (
        _row_objective(weight, x.dequantized(tier), hessian) for x in (quantized, fitted)
    )
    helps = after < before
    return AffineWeight(
        quantized.q,
        mx.where(helps, fitted.scales, quantized.scales),
        mx.where(helps, fitted.biases, quantized.biases),
    )


def _group_step(pull: mx.array, q: mx.array, hessian: mx.array) -> tuple[mx.array, mx.array]:
    """Return the changes (..., out, 1) of a group's scales and biases that minimize the objective.

    `pull` (..., out, size) is the remaining error times H, `q` (..., out, size) the integers,
    `hessian` (..., size, size) the group's block of H. No change where all integers are equal.
    """
    hq = q @ hessian
    ones = hessian.sum(axis=-1)[..., None, :]
    qq, q1 = (hq * q).sum(axis=-1, keepdims=True), hq.sum(axis=-1, keepdims=True)
    one = ones.sum(axis=-1, keepdims=True)
    slope = (pull * q).sum(axis=-1, keepdims=True)
    offset = pull.sum(axis=-1, keepdims=True)
    det = qq * one - q1 * q1
    fits = det > 1e-6 * qq * one
    det = mx.where(fits, det, 1)
    ds = mx.where(fits, (one * slope - q1 * offset) / det, 0)
    return ds, mx.where(fits, (qq * offset - q1 * slope) / det, 0)
