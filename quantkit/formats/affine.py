"""Choosing the integers, scales and biases of affine tiers: pure functions on arrays.

A group of values w is stored as integers q in 0 .. 2^bits - 1 with one scale s and bias b, for
s q + b. `mx.quantize` anchors the group's extremes; here s and b are chosen for a purpose:

    search    least error weighted by how much each input channel matters
    gptq      error feedback: what rounding one column leaves is taken up by those after it
    refit     the integers fixed, all scales and biases of a row at once

gptq follows Frantar et al. 2022 (arXiv 2210.17323), with scales from the search on what is left of
the weight when its group is reached. The objective is (w - v) H (w - v)^T for every row w and its
rounded values v, H being the mean of x x^T over the weight's inputs x.
"""

from dataclasses import dataclass

import numpy as np

from quantkit.backend import mx
from quantkit.formats.tiers import Tier

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)  # of a group's range
_REFINED = 2  # rounds of least squares on the integers
_SWEEPS = 6  # of refit over the groups


@dataclass(frozen=True)
class Rounded:
    """A weight (..., out, in) in an affine tier: integers `q` (..., out, in) in uint8, `scales` and
    `biases` (..., out, groups) in the type they are stored in."""

    q: mx.array
    scales: mx.array
    biases: mx.array

    def values(self, tier: Tier) -> mx.array:
        """What it stands for, in float32, as kernels compute it."""
        groups = _grouped(self.q.astype(mx.float32), tier)
        wide = (part.astype(mx.float32)[..., None] for part in (self.scales, self.biases))
        scales, biases = wide
        return (groups * scales + biases).reshape(self.q.shape)

    def packed(self, tier: Tier) -> tuple[mx.array, mx.array, mx.array]:
        """The tensors that MLX stores: integers packed into uint32, little end first."""
        eights = self.q.reshape(*self.q.shape[:-1], -1, 8).astype(mx.uint64)
        shifts = mx.arange(8, dtype=mx.uint64) * tier.bits
        words = (eights << shifts).sum(axis=-1, keepdims=True).view(mx.uint8)[..., : tier.bits]
        flat = mx.contiguous(words.reshape(*self.q.shape[:-1], -1))
        return flat.view(mx.uint32), self.scales, self.biases


def search(weight: mx.array, importance: mx.array, tier: Tier, dtype: mx.Dtype) -> Rounded:
    """Scales and biases of least error sum_i importance_i (w_i - s q_i - b)^2 in every group.

    `weight` (..., out, in) float32; `importance` (..., in), broadcast over the rows. Never worse
    than rounding to nearest by that measure: `mx.quantize`'s own choice is among those tried.
    """
    w = _grouped(weight, tier)
    h = _grouped(importance, tier)[..., None, :, :]
    scales, biases = _searched(w, h, tier, dtype, _nearest(weight, tier, dtype))
    q = _integers(w, scales, biases, tier)
    return Rounded(q.reshape(weight.shape).astype(mx.uint8), scales, biases)


def _nearest(weight: mx.array, tier: Tier, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """The scales and biases that `mx.quantize` takes."""
    _, scales, biases = mx.quantize(weight.astype(dtype), tier.group_size, tier.bits)
    return scales, biases


def _searched(
    w: mx.array,
    h: mx.array,
    tier: Tier,
    dtype: mx.Dtype,
    first: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array]:
    """The best scales and biases (..., groups) for `w` (..., groups, size) that were found."""
    levels = 2**tier.bits - 1
    low, high = w.min(axis=-1), w.max(axis=-1)
    middle, reach = (low + high) / 2, mx.maximum(high - low, 1e-12)
    best = first
    least = _error(w, h, *first, tier)
    for factor in _SHRINK:
        scales = reach * factor / levels
        biases = middle - scales * (levels / 2)
        for _ in range(_REFINED + 1):
            stored = scales.astype(dtype), biases.astype(dtype)
            error = _error(w, h, *stored, tier)
            better = error < least
            best = tuple(mx.where(better, a, b) for a, b in zip(stored, best, strict=True))  # type: ignore[assignment]
            least = mx.minimum(error, least)
            scales, biases = _fitted(w, h, _integers(w, *stored, tier), scales, biases)
        mx.eval(best, least)
    return best


def _error(w: mx.array, h: mx.array, scales: mx.array, biases: mx.array, tier: Tier) -> mx.array:
    s, b = (part.astype(mx.float32)[..., None] for part in (scales, biases))
    return (h * mx.square(w - _integers(w, scales, biases, tier) * s - b)).sum(axis=-1)


def _integers(w: mx.array, scales: mx.array, biases: mx.array, tier: Tier) -> mx.array:
    """The integers nearest to `w` (..., groups, size), as float32."""
    s, b = (part.astype(mx.float32)[..., None] for part in (scales, biases))
    q = mx.round((w - b) / mx.where(s == 0, 1, s))
    return mx.clip(q, 0, 2**tier.bits - 1)


def _fitted(
    w: mx.array, h: mx.array, q: mx.array, scales: mx.array, biases: mx.array
) -> tuple[mx.array, mx.array]:
    """Weighted least squares for s and b, the integers given; as before where all are equal."""
    total = h.sum(axis=-1)
    mean_q, mean_w = (h * q).sum(axis=-1) / total, (h * w).sum(axis=-1) / total
    around = q - mean_q[..., None]
    spread = (h * mx.square(around)).sum(axis=-1)
    fits = spread > 1e-9 * total
    slope = (h * around * w).sum(axis=-1) / mx.where(fits, spread, 1)
    s = mx.where(fits, slope, scales)
    return s, mx.where(fits, mean_w - s * mean_q, biases)


@dataclass(frozen=True)
class Feedback:
    """What gptq needs of Hessians (..., in, in), their columns in the order they are taken:
    `importance` (..., in) is the diagonal, `upper` U with U^T U the inverse of the damped one."""

    order: tuple[int, ...]
    importance: mx.array
    upper: mx.array


def feedback(
    hessian: mx.array, group_size: int, *, by_size: bool = False, damping: float = 0.01
) -> Feedback:
    """Damped by a share of the mean diagonal. `by_size` takes the groups with the largest inputs
    first (activation order), all experts alike; else they come as they are stored."""
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
    return Feedback(order, diagonal, upper)


def gptq(weight: mx.array, feedback: Feedback, tier: Tier, dtype: mx.Dtype) -> Rounded:
    """Round `weight` (..., out, in) in float32, what every column leaves taken up by the next."""
    size = tier.group_size
    order = feedback.order
    w = mx.take(_grouped(weight, tier), mx.array(order), axis=-2).reshape(weight.shape)
    qs: list[mx.array] = []
    scales, biases = [], []
    for _ in order:
        part = slice(len(qs) * size, (len(qs) + 1) * size)
        block, upper = mx.contiguous(w[..., :size]), feedback.upper[..., part, :]
        h = feedback.importance[..., None, None, part]
        s, b = _searched(block[..., None, :], h, tier, dtype, _nearest(block, tier, dtype))
        q, errors = _through_group(block, upper[..., part], s, b, tier)
        w = w[..., size:] - errors @ upper[..., part.stop :]
        mx.eval(w, q, s, b)
        qs.append(q)
        scales.append(s)
        biases.append(b)
    places = sorted(range(len(order)), key=lambda place: order[place])
    q, s, b = (mx.concatenate([x[p] for p in places], axis=-1) for x in (qs, scales, biases))
    return Rounded(q.astype(mx.uint8), s, b)


def _through_group(
    block: mx.array, upper: mx.array, scales: mx.array, biases: mx.array, tier: Tier
) -> tuple[mx.array, mx.array]:
    """Column by column through a group (..., out, size): (integers, errors over U's diagonal)."""
    s, b = (part.astype(mx.float32)[..., 0] for part in (scales, biases))
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
    """(w - v) H (w - v)^T summed over the rows, for every matrix of a stack."""
    return _row_objective(weight, values, hessian).sum(axis=(-2, -1))


def _row_objective(weight: mx.array, values: mx.array, hessian: mx.array) -> mx.array:
    d = weight - values
    return ((d @ hessian) * d).sum(axis=-1, keepdims=True)


def refit(weight: mx.array, hessian: mx.array, rounded: Rounded, tier: Tier) -> Rounded:
    """The scales and biases of least objective for the integers that `rounded` has.

    All of a row together solve one small linear system; here group after group in turn (block
    Gauss-Seidel), which costs a product with H a sweep. Each is rounded to its stored type at
    once, so that the groups after it make up for that, too. Kept only where it helps.
    """
    dtype = rounded.scales.dtype
    q = rounded.q.astype(mx.float32)
    left = weight - rounded.values(tier)
    pull = left @ hessian
    scales, biases = (
        list(mx.split(part.astype(mx.float32), part.shape[-1], axis=-1))
        for part in (rounded.scales, rounded.biases)
    )
    for _ in range(_SWEEPS):
        for g in range(len(scales)):
            part = slice(g * tier.group_size, (g + 1) * tier.group_size)
            own, a = hessian[..., part, part], q[..., part]
            ha = a @ own
            ones = own.sum(axis=-1)[..., None, :]
            qq, q1 = (ha * a).sum(axis=-1, keepdims=True), ha.sum(axis=-1, keepdims=True)
            one = ones.sum(axis=-1, keepdims=True)
            slope = (pull[..., part] * a).sum(axis=-1, keepdims=True)
            offset = pull[..., part].sum(axis=-1, keepdims=True)
            det = qq * one - q1 * q1
            fits = det > 1e-6 * qq * one
            det = mx.where(fits, det, 1)
            s = scales[g] + mx.where(fits, (one * slope - q1 * offset) / det, 0)
            b = biases[g] + mx.where(fits, (qq * offset - q1 * slope) / det, 0)
            s, b = (part_.astype(dtype).astype(mx.float32) for part_ in (s, b))
            moved = a * (s - scales[g]) + (b - biases[g])
            pull = pull - moved @ hessian[..., part, :]
            scales[g], biases[g] = s, b
            mx.eval(pull, s, b)
    fitted = Rounded(
        rounded.q,
        mx.concatenate(scales, axis=-1).astype(dtype),
        mx.concatenate(biases, axis=-1).astype(dtype),
    )
    before, after = (_row_objective(weight, x.values(tier), hessian) for x in (rounded, fitted))
    helps = after < before
    return Rounded(
        rounded.q,
        mx.where(helps, fitted.scales, rounded.scales),
        mx.where(helps, fitted.biases, rounded.biases),
    )


def _grouped(values: mx.array, tier: Tier) -> mx.array:
    return values.reshape(*values.shape[:-1], -1, tier.group_size)
