"""The `search` quantizer: scales and biases of least weighted error, group by group.

`mx.quantize` anchors the extremes of a group. Here several shrunken ranges are tried, each refined
by weighted least squares on its integers; the weight of an input channel is its mean square.
"""

from quantkit.backend import mx
from quantkit.formats.affine import AffineWeight, grouped
from quantkit.formats.tiers import Tier
from quantkit.quantizers.hessians import Hessians

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)  # of a group's range
_REFINEMENTS = 2  # rounds of least squares on the integers
Scales = tuple[mx.array, mx.array]
"""Scales and biases (..., out, groups)."""


def quantize(weight: mx.array, hessians: Hessians, tier: Tier, dtype: mx.Dtype) -> AffineWeight:
    """Quantize `weight` (matrices, out, in) in float32, its scales and biases stored as `dtype`."""
    return search(weight, hessians.importance, tier, dtype)


def search(weight: mx.array, importance: mx.array, tier: Tier, dtype: mx.Dtype) -> AffineWeight:
    """Minimize sum_i importance_i (w_i - s q_i - b)^2 in every group.

    `weight` (..., out, in) is float32, `importance` (..., in) is broadcast over the rows. By this
    measure the result is never worse than `mx.quantize`, whose choice is among the candidates.
    """
    w = grouped(weight, tier)
    h = grouped(importance, tier)[..., None, :, :]
    scales, biases = searched_scales(w, h, tier, dtype, nearest_scales(weight, tier, dtype))
    q = _integers(w, scales, biases, tier)
    return AffineWeight(q.reshape(weight.shape).astype(mx.uint8), scales, biases)


def nearest_scales(weight: mx.array, tier: Tier, dtype: mx.Dtype) -> Scales:
    """Return the scales and biases that `mx.quantize` chooses for `weight` (..., out, in)."""
    _, scales, biases = mx.quantize(weight.astype(dtype), tier.group_size, tier.bits)
    return scales, biases


def searched_scales(w: mx.array, h: mx.array, tier: Tier, dtype: mx.Dtype, first: Scales) -> Scales:
    """Return the best scales and biases (..., groups) for `w` (..., groups, size).

    `h` (..., groups, size) weighs squared errors; `first` is the candidate to improve on.
    """
    levels = 2**tier.bits - 1
    low, high = w.min(axis=-1), w.max(axis=-1)
    middle, reach = (low + high) / 2, mx.maximum(high - low, 1e-12)
    best = first
    least = _error(w, h, *first, tier)
    for factor in _SHRINK:
        scales = reach * factor / levels
        biases = middle - scales * (levels / 2)
        for _ in range(_REFINEMENTS + 1):
            stored = scales.astype(dtype), biases.astype(dtype)
            error = _error(w, h, *stored, tier)
            better = error < least
            best = tuple(mx.where(better, a, b) for a, b in zip(stored, best, strict=True))  # type: ignore[assignment]
            least = mx.minimum(error, least)
            scales, biases = _fitted(w, h, _integers(w, *stored, tier), (scales, biases))
        mx.eval(best, least)
    return best


def _error(w: mx.array, h: mx.array, scales: mx.array, biases: mx.array, tier: Tier) -> mx.array:
    s, b = (x.astype(mx.float32)[..., None] for x in (scales, biases))
    return (h * mx.square(w - _integers(w, scales, biases, tier) * s - b)).sum(axis=-1)


def _integers(w: mx.array, scales: mx.array, biases: mx.array, tier: Tier) -> mx.array:
    """Return the integers nearest to `w` (..., groups, size), as float32."""
    s, b = (x.astype(mx.float32)[..., None] for x in (scales, biases))
    q = mx.round((w - b) / mx.where(s == 0, 1, s))
    return mx.clip(q, 0, 2**tier.bits - 1)


def _fitted(w: mx.array, h: mx.array, q: mx.array, before: Scales) -> Scales:
    """Return weighted least-squares s and b for given integers; `before` if all are equal."""
    total = h.sum(axis=-1)
    mean_q, mean_w = (h * q).sum(axis=-1) / total, (h * w).sum(axis=-1) / total
    around = q - mean_q[..., None]
    spread = (h * mx.square(around)).sum(axis=-1)
    fits = spread > 1e-9 * total
    slope = (h * around * w).sum(axis=-1) / mx.where(fits, spread, 1)
    s = mx.where(fits, slope, before[0])
    return s, mx.where(fits, mean_w - s * mean_q, before[1])
