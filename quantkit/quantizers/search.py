"""The `search` quantizer: scales and biases of least weighted error, group by group.

`mx.quantize` anchors the extremes of a group. Here several shrunken ranges are tried, each refined
by weighted least squares on its integers; the weight of an input channel is its mean square.
"""

from dataclasses import dataclass

from quantkit.backend import mx
from quantkit.formats.affine import AffineWeight, grouped
from quantkit.formats.tiers import Tier
from quantkit.quantizers.hessians import Hessians

# Few starts with many refinements: on the demo's experts as good as ten starts with two.
_SHRINK = (1.0, 0.88, 0.76, 0.64)  # of a group's range
_FEW_BITS = 4  # up to which the error is large enough to be computed from sums
_REFINEMENTS = 4  # rounds of least squares on the integers
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
    weighted = _Weighted.of(w, h)
    best, least = first, mx.full(low.shape, mx.inf)
    for factor in _SHRINK:
        scales = reach * factor / levels
        biases = middle - scales * (levels / 2)
        for _ in range(_REFINEMENTS + 1):
            stored = scales.astype(dtype), biases.astype(dtype)
            sums = weighted.sums(_integers(w, *stored, tier))
            if tier.bits <= _FEW_BITS:
                error = weighted.error(sums, *stored)
            else:
                error = _exact_error(w, h, *stored, tier)
            better = error < least
            best = _chosen(better, stored, best)
            least = mx.minimum(error, least)
            scales, biases = weighted.fitted(sums, (scales, biases))
        mx.eval(best, least)
    better = _exact_error(w, h, *best, tier) < _exact_error(w, h, *first, tier)
    return _chosen(better, best, first)


def _chosen(first: mx.array, a: Scales, b: Scales) -> Scales:
    """Return the scales and biases (..., groups) of `a` where `first` (..., groups) is true."""
    return mx.where(first, a[0], b[0]), mx.where(first, a[1], b[1])


def _exact_error(
    w: mx.array, h: mx.array, scales: mx.array, biases: mx.array, tier: Tier
) -> mx.array:
    """Return the weighted squared error (..., groups), free of cancellation."""
    s, b = (x.astype(mx.float32)[..., None] for x in (scales, biases))
    return (h * mx.square(w - _integers(w, scales, biases, tier) * s - b)).sum(axis=-1)


def _integers(w: mx.array, scales: mx.array, biases: mx.array, tier: Tier) -> mx.array:
    """Return the integers nearest to `w` (..., groups, size), as float32."""
    s, b = (x.astype(mx.float32)[..., None] for x in (scales, biases))
    return mx.clip(mx.round((w - b) / mx.where(s == 0, 1, s)), 0, 2**tier.bits - 1)


Sums = tuple[mx.array, mx.array, mx.array]
"""Sums of h q, h q^2 and h q w over every group (..., groups)."""


@dataclass(frozen=True)
class _Weighted:
    """Values of groups (..., groups, size) around their `mean` (..., groups), and their sums.

    `h` (..., groups, size) are weights, `hw` the products of weights and values; `sum_h` and
    `sum_hww` (..., groups) are sums of h and of h w^2. The sum of h w is 0.
    """

    h: mx.array
    hw: mx.array
    mean: mx.array
    sum_h: mx.array
    sum_hww: mx.array

    @classmethod
    def of(cls, w: mx.array, h: mx.array) -> "_Weighted":
        """Return the sums of values `w` and weights `h` (..., groups, size)."""
        sum_h = h.sum(axis=-1)
        mean = (h * w).sum(axis=-1) / sum_h
        around = w - mean[..., None]
        hw = h * around
        return cls(h, hw, mean, sum_h, (hw * around).sum(axis=-1))

    def sums(self, q: mx.array) -> Sums:
        """Return the sums over integers `q` (..., groups, size)."""
        hq = self.h * q
        return hq.sum(axis=-1), (hq * q).sum(axis=-1), (self.hw * q).sum(axis=-1)

    def error(self, sums: Sums, scales: mx.array, biases: mx.array) -> mx.array:
        """Return the weighted squared error (..., groups), expanded into sums over integers."""
        hq, hqq, hwq = sums
        s, b = scales.astype(mx.float32), biases.astype(mx.float32) - self.mean
        return self.sum_hww + s * (s * hqq - 2 * hwq + 2 * b * hq) + b * b * self.sum_h

    def fitted(self, sums: Sums, before: Scales) -> Scales:
        """Return weighted least-squares s and b (..., groups) for integers with these sums;
        `before` if all of a group are equal.
        """
        hq, hqq, hwq = sums
        mean_q = hq / self.sum_h
        spread = hqq - mean_q * hq
        fits = spread > 1e-6 * self.sum_h
        s = mx.where(fits, hwq / mx.where(fits, spread, 1), before[0])
        return s, mx.where(fits, self.mean - s * mean_q, before[1])
