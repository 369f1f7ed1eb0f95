"""Encoding and decoding weights with mlx: what a tier's tensors hold."""

import numpy as np

from quantkit.backend import mx, on_cpu
from quantkit.formats import mxfp4
from quantkit.formats.tiers import MXFP4, Tier

_AT_ONCE = 16_000_000  # values
FLOAT_TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def to_mx(carrier: np.ndarray, dtype: str) -> mx.array:
    """A numpy carrier (BF16 as uint16) as an mlx array of `dtype`."""
    array = mx.array(carrier)
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def to_numpy(array: mx.array) -> np.ndarray:
    """An mlx array as its numpy carrier, in row-major order: BF16 as uint16, all else as itself.

    Shares the array's memory where that is laid out so.
    """
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.asarray(bits)).reshape(array.shape)


def encode(weight: mx.array, tier: Tier) -> tuple[mx.array, ...]:
    """Round `weight` (..., out, in) to nearest in `tier`: its tensors in the tier's own order.

    A float tier is a cast, a quantized one mlx's own `mx.quantize`, bit for bit. Affine scales and
    biases have the dtype of `weight`. Raises TierError if the tier does not fit.
    """
    if not tier.quantized:
        return (weight.astype(FLOAT_TYPES[tier.name.upper()]),)
    tier.require_fit("weight", weight.shape)
    return tuple(mx.quantize(weight, group_size=tier.group_size, bits=tier.bits, mode=tier.mode))


def decode(tensors: tuple[mx.array, ...], tier: Tier, dtype: str = "BF16") -> mx.array:
    """The float values that `tensors`, in the order `encode` gave them, stand for."""
    if not tier.quantized:
        return tensors[0].astype(FLOAT_TYPES[dtype])
    packed, scales, *biases = tensors
    return mx.dequantize(
        packed,
        scales,
        biases[0] if biases else None,
        group_size=tier.group_size,
        bits=tier.bits,
        mode=tier.mode,
        dtype=FLOAT_TYPES[dtype],
    )


def rounded(weight: mx.array, tier: Tier) -> mx.array:
    """What `weight` becomes in `tier`, rounded to nearest: its values in float32.

    Scales and biases take part in float32, as kernels do it; in BF16 the products would be rounded
    once more.
    """
    if weight.ndim > 2 and weight.size > _AT_ONCE:  # what decoding goes through is large, too
        values = mx.zeros(weight.shape)
        for number, part in enumerate(weight):
            values[number] = rounded(part, tier)
            mx.eval(values)  # in place, as long as nothing else holds it
        return values
    packed, *rest = encode(weight, tier)
    wide = [part.astype(mx.float32) if part.dtype != mx.uint8 else part for part in rest]
    return decode((packed, *wide), tier, "F32")


def decode_mxfp4(packed: np.ndarray, scales: np.ndarray) -> mx.array:
    """MXFP4 carriers (rows, in/8) and (rows, in/32) as BF16 (rows, in), exactly."""
    if on_cpu():
        return to_mx(mxfp4.to_bfloat16(packed, scales), "BF16")
    return decode((mx.array(packed), mx.array(scales)), MXFP4)
