"""Affine weights: integers q in 0 .. 2^bits - 1, with one scale s and bias b per group: s q + b."""

from dataclasses import dataclass

from quantkit.backend import mx
from quantkit.formats.tiers import Tier


@dataclass(frozen=True)
class AffineWeight:
    """A weight (..., out, in) in an affine tier, before its integers are packed.

    `q` (..., out, in) is uint8; `scales` and `biases` (..., out, groups) have their stored dtype.
    """

    q: mx.array
    scales: mx.array
    biases: mx.array

    def dequantized(self, tier: Tier) -> mx.array:
        """Return the values (..., out, in) in float32, as MLX's kernels compute them."""
        groups = grouped(self.q.astype(mx.float32), tier)
        scales, biases = (x.astype(mx.float32)[..., None] for x in (self.scales, self.biases))
        return (groups * scales + biases).reshape(self.q.shape)

    def packed(self, tier: Tier) -> tuple[mx.array, mx.array, mx.array]:
        """Return the stored tensors: integers packed into uint32 (..., out, in * bits / 32), little
        end first, scales and biases (..., out, groups)."""
        eights = self.q.reshape(*self.q.shape[:-1], -1, 8).astype(mx.uint64)
        shifts = mx.arange(8, dtype=mx.uint64) * tier.bits
        words = (eights << shifts).sum(axis=-1, keepdims=True).view(mx.uint8)[..., : tier.bits]
        flat = mx.contiguous(words.reshape(*self.q.shape[:-1], -1))
        return flat.view(mx.uint32), self.scales, self.biases


def concatenate(weights: list[AffineWeight], axis: int) -> AffineWeight:
    """Concatenate weights (..., out, in) along an axis other than the last."""
    columns = zip(*((w.q, w.scales, w.biases) for w in weights), strict=True)
    return AffineWeight(*(mx.concatenate(list(column), axis=axis) for column in columns))


def grouped(values: mx.array, tier: Tier) -> mx.array:
    """Return `values` (..., in) as (..., groups, group size)."""
    return values.reshape(*values.shape[:-1], -1, tier.group_size)
