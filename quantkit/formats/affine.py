"""Affine weights: integers q in 0 .. 2^bits - 1, with one scale s and bias b per group: s q + b."""

from dataclasses import dataclass

from quantkit.backend import mx
from quantkit.backend.memory_limits import memory_limits
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
        rows = self.q.reshape(-1, self.q.shape[-1])
        step = max(1, memory_limits().decoded_values // rows.shape[1])
        words = []
        for start in range(0, len(rows), step):
            words.append(_packed_rows(rows[start : start + step], tier.bits))
            mx.eval(words[-1])  # temporaries take nine bytes per value
        packed = mx.concatenate(words).reshape(*self.q.shape[:-1], -1)
        return packed, self.scales, self.biases


def _packed_rows(rows: mx.array, bits: int) -> mx.array:
    """Pack integers (rows, in) into uint32 (rows, in * bits / 32), eight of them at a time."""
    eights = rows.reshape(len(rows), -1, 8).astype(mx.uint64)
    shifts = mx.arange(8, dtype=mx.uint64) * bits
    words = (eights << shifts).sum(axis=-1, keepdims=True).view(mx.uint8)[..., :bits]
    return mx.contiguous(words.reshape(len(rows), -1)).view(mx.uint32)


def concatenate(weights: list[AffineWeight], axis: int) -> AffineWeight:
    """Concatenate weights (..., out, in) along an axis other than the last."""
    columns = zip(*((w.q, w.scales, w.biases) for w in weights), strict=True)
    return AffineWeight(*(mx.concatenate(list(column), axis=axis) for column in columns))


def grouped(values: mx.array, tier: Tier) -> mx.array:
    """Return `values` (..., in) as (..., groups, group size)."""
    return values.reshape(*values.shape[:-1], -1, tier.group_size)
