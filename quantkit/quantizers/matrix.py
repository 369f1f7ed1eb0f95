"""One weight quantized under the Hessians of its inputs, in slices that fit in memory."""

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.backend import mx
from quantkit.backend.memory_limits import memory_limits
from quantkit.errors import DamagedError
from quantkit.formats.affine import AffineWeight, concatenate
from quantkit.formats.codec import FLOAT_TYPES
from quantkit.formats.tiers import Tier
from quantkit.quantizers.hessians import Hessians, stacked
from quantkit.quantizers.input_sums import InputSums
from quantkit.quantizers.registry import Quantizer


def quantize_rows(
    weight: mx.array, hessians: Hessians, tier: Tier, quantizer: Quantizer, dtype: mx.Dtype
) -> AffineWeight:
    """Quantize `weight` (matrices, out, in) in float32, some rows at a time.

    Scales and biases are stored as `dtype`.
    """
    quantize = quantizer.function()
    step = max(1, memory_limits().block_values // (weight.shape[0] * weight.shape[-1]))
    slices: list[AffineWeight] = []
    for start in range(0, weight.shape[-2], step):
        rows = hessians.target(weight[..., start : start + step, :])
        slices.append(quantize(rows, hessians, tier, dtype))
        mx.eval(slices[-1].q, slices[-1].scales, slices[-1].biases)
    return slices[0] if len(slices) == 1 else concatenate(slices, axis=-2)


def quantize_weight(
    weight: Weight, values: mx.array, inputs: InputSums, tier: Tier, quantizer: Quantizer
) -> AffineWeight:
    """Quantize all `values` (..., out, in) of a weight under the Hessians of its `inputs`."""
    stack = stacked(values)
    slices = []
    for experts, moments in inputs.moments():
        chunk = stack[experts].astype(mx.float32)
        dtype = scales_dtype(weight)
        slices.append(quantize_rows(chunk, Hessians(moments), tier, quantizer, dtype))
    whole = concatenate(slices, axis=0)
    shaped = (x.reshape(*values.shape[:-1], -1) for x in (whole.q, whole.scales, whole.biases))
    return AffineWeight(*shaped)


def scales_dtype(weight: Weight) -> mx.Dtype:
    """Return the dtype in which the scales and biases of a weight are stored."""
    return FLOAT_TYPES[weight.dtype]


def require_finite(name: str, values: mx.array) -> None:
    """Raise DamagedError if `values` of any shape hold NaN or infinity; `name` is the weight."""
    if bad := values.size - int(np.array(mx.isfinite(values).sum())):
        raise DamagedError(
            f"{name}: {bad} of {values.size} values are NaN or infinite and cannot be "
            "quantized. The checkpoint is damaged: download it again."
        )
