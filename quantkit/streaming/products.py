"""Products with other weights in place of a layer's own, which stay packed in memory."""

from collections.abc import Callable, Sequence
from typing import Any

from quantkit.backend import mx, on_cpu
from quantkit.formats.codec import decode
from quantkit.formats.tiers import Tier
from quantkit.streaming.experts import switch_product

Product = Callable[..., mx.array]
"""Replaces a weight's module: called with the module and its arguments."""


class ExpertSlices:
    """A stack (experts, out, in) whose matrices `values(which)` makes on access, so that the whole
    stack is never in memory."""

    def __init__(self, shape: tuple[int, ...], values: Callable[[slice], mx.array]) -> None:
        self.shape = shape
        self._values = values

    def __getitem__(self, which: slice) -> mx.array:
        return self._values(which)


def decoded_slices(tensors: Sequence[mx.array], tier: Tier) -> ExpertSlices:
    """Return a packed stack (experts, out, in), whose `tensors` have the order of `encode`, as
    float32 slices that are decoded on access."""
    packed, *scales = _wide(tensors)

    def values(which: slice) -> mx.array:
        return decode((packed[which], *(x[which] for x in scales)), tier, "F32")

    width = packed.shape[-1] * 32 // tier.bits
    return ExpertSlices((*packed.shape[:-1], width), values)


def plain_product(weight: mx.array) -> Product:
    """Return the product with a matrix `weight` (out, in)."""

    def plain(module: Any, x: mx.array) -> mx.array:
        return _biased(module, x @ weight.T)

    return plain


def experts_product(weight: ExpertSlices) -> Product:
    """Return the product with a stack (experts, out, in), a slice of it at a time."""

    def experts(module: Any, *args: Any, **kwargs: Any) -> mx.array:
        return switch_product(module, weight, *args, **kwargs)

    return experts


def packed_product(tensors: Sequence[mx.array], tier: Tier) -> Product:
    """Return the product with a packed weight (..., out, in), whose `tensors` have the order of
    `encode`.

    A GPU computes with them as they are, a CPU decodes a matrix at a time.
    """
    if on_cpu() and tensors[0].ndim > 2:
        return experts_product(decoded_slices(tensors, tier))
    packed, *scales = wide = _wide(tensors)
    if on_cpu():
        return plain_product(decode(wide, tier, "F32"))
    settings: dict[str, Any] = {
        "scales": scales[0],
        "biases": scales[1] if len(scales) > 1 else None,
        "transpose": True,
        "group_size": tier.group_size,
        "bits": tier.bits,
        "mode": tier.mode,
    }

    def matrix(module: Any, x: mx.array) -> mx.array:
        return _biased(module, mx.quantized_matmul(x, packed, **settings))

    def experts(
        module: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        order: dict[str, Any] = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        y = mx.gather_qmm(x, packed, **settings, **order)
        return y + mx.expand_dims(module.bias[indices], -2) if "bias" in module else y

    return experts if packed.ndim > 2 else matrix


def _wide(tensors: Sequence[mx.array]) -> tuple[mx.array, ...]:
    """Return packed tensors with affine scales and biases in float32."""
    packed, *scales = tensors
    return packed, *(x if x.dtype == mx.uint8 else x.astype(mx.float32) for x in scales)


def _biased(module: Any, y: mx.array) -> mx.array:
    return y + module.bias if "bias" in module else y
