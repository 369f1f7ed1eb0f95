"""The `search` quantizer: scales and biases of least weighted error, group by group.

`mx.quantize` anchors the extremes of a group. Here several shrunken ranges are tried, each refined
by weighted least squares on its integers; the weight of an input channel is its mean square.
"""

from dataclasses import dataclass

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
    weighted = _Weighted(w, h, h * w, h.sum(axis=-1), (h * w).sum(axis=-1))
    best = first
    least = weighted.error(_integers(w, *first, tier), *first)
    for factor in _SHRINK:
        scales = reach * factor / levels
        biases = middle - scales * (levels / 2)
        for _ in range(_REFINEMENTS + 1):
            stored = scales.astype(dtype), biases.astype(dtype)
            q = _integers(w, *stored, tier)
            error = weighted.error(q, *stored)
            better = error < least
            best = tuple(mx.where(better, a, b) for a, b in zip(stored, best, strict=True))  # type: ignore[assignment]
            least = mx.minimum(error, least)
            scales, biases = weighted.fitted(q, (scales, biases))
        mx.eval(best, least)
    return best


def _integers(w: mx.array, scales: mx.array, biases: mx.array, tier: Tier) -> mx.array:
    """Return the integers nearest to `w` (..., groups, size), as float32."""
    s, b = (x.astype(mx.float32)[..., None] for x in (scales, biases))
    return mx.clip(mx.round((w - b) / mx.where(s == 0, 1, s)), 0, 2**tier.bits - 1)


@dataclass(frozen=True)
class _Weighted:
    """Values `w` (..., groups, size) with weights `h`, and sums of `h` and `hw` over the groups."""

    w: mx.array
    h: mx.array
    hw: mx.array
    sum_h: mx.array
    sum_hw: mx.array

    def error(self, q: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        """Return the weighted squared error (..., groups)."""
        s, b = (x.astype(mx.float32)[..., None] for x in (scales, biases))
        return (self.h * mx.square(self.w - q * s - b)).sum(axis=-1)

    def fitted(self, q: mx.array, before: Scales) -> Scales:
        """Return weighted least-squares s and b (..., groups) for integers `q` (..., groups, size);
        `before` if all of a group are equal.
        """
        hq = self.h * q
        sum_hq = hq.sum(axis=-1)
        mean_q, mean_w = sum_hq / self.sum_h, self.sum_hw / self.sum_h
        spread = (hq * q).sum(axis=-1) - mean_q * sum_hq
        fits = spread > 1e-6 * self.sum_h
        slope = ((self.hw * q).sum(axis=-1) - mean_q * self.sum_hw) / mx.where(fits, spread, 1)
        s = mx.where(fits, slope, before[0])
        return s, mx.where(fits, mean_w - s * mean_q, before[1])
