"""Encode and decode weights with mlx."""

import numpy as np

from quantkit.backend import mx, on_cpu
from quantkit.backend.memory_limits import memory_limits
from quantkit.formats import mxfp4
from quantkit.formats.tiers import MXFP4, Tier

FLOAT_TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def to_mx(carrier: np.ndarray, dtype: str) -> mx.array:
    """Return a numpy carrier of any shape (BF16 as uint16) as an mlx array of `dtype`."""
    array = mx.array(carrier)
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def to_numpy(array: mx.array) -> np.ndarray:
    """Return an mlx array of any shape as its row-major numpy carrier, BF16 as uint16.

    Shares the memory of a row-major array.
    """
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.asarray(bits)).reshape(array.shape)


def encode(weight: mx.array, tier: Tier) -> tuple[mx.array, ...]:
    """Round `weight` (..., out, in) to nearest, and return the tensors of `tier`.

    A float tier is a cast; a quantized tier is `mx.quantize`, bit for bit. Affine scales and biases
    have the dtype of `weight`. Raises TierError if the tier does not fit.
    """
    if not tier.quantized:
        return (weight.astype(FLOAT_TYPES[tier.name.upper()]),)
    tier.require_fit("weight", weight.shape)
    if _is_large_stack(weight):
        matrices = []
        for matrix in weight:
            matrices.append(encode(matrix, tier))
            mx.eval(matrices[-1])
        return tuple(mx.stack(list(parts)) for parts in zip(*matrices, strict=True))
    return tuple(mx.quantize(weight, group_size=tier.group_size, bits=tier.bits, mode=tier.mode))


def decode(tensors: tuple[mx.array, ...], tier: Tier, dtype: str = "BF16") -> mx.array:
    """Return the float values (..., out, in) of `tensors`, which have the order of `encode`."""
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


def fake_quantize(weight: mx.array, tier: Tier) -> mx.array:
    """Round `weight` (..., out, in) to nearest in `tier` and decode it again, in float32.

    Scales and biases are widened to float32 first, as in MLX's kernels; BF16 would round the
    products once more.
    """
    if _is_large_stack(weight):
        values = mx.zeros(weight.shape)
        for number, matrix in enumerate(weight):
            values[number] = fake_quantize(matrix, tier)
            mx.eval(values)  # in place, since no other array refers to it
        return values
    packed, *scales = encode(weight, tier)
    wide = [x.astype(mx.float32) if x.dtype != mx.uint8 else x for x in scales]
    return decode((packed, *wide), tier, "F32")


def _is_large_stack(weight: mx.array) -> bool:
    """Return whether to take the matrices of a stack one by one: on a CPU, temporaries of decoding
    are as large as the result, those of quantizing to MXFP4 ten times as large in float32."""
    return weight.ndim > 2 and weight.size > memory_limits().decoded_values


def decode_mxfp4(packed: np.ndarray, scales: np.ndarray) -> mx.array:
    """Decode MXFP4 carriers (rows, in/8) and (rows, in/32) exactly, to BF16 (rows, in)."""
    if on_cpu():
        return to_mx(mxfp4.to_bfloat16(packed, scales), "BF16")
    return decode((mx.array(packed), mx.array(scales)), MXFP4)
