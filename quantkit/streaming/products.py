"""Products with other weights in place of a layer's own, which stay packed in memory."""

from collections.abc import Callable, Sequence
from typing import Any

from quantkit.backend import mx, on_cpu
from quantkit.formats.codec import decode
from quantkit.formats.tiers import Tier
from quantkit.streaming.experts import switch_product

Product = Callable[..., mx.array]
"""Replaces a weight's module: called with the module and its arguments."""


class ExpertMatrices:
    """A stack (experts, out, in) that is never whole in memory: `times(rows, expert)` returns the
    product of rows (n, in) with one of its matrices, (n, out)."""

    def __init__(self, shape: tuple[int, ...], times: Callable[[mx.array, int], mx.array]) -> None:
        self.shape = shape
        self.times = times


def decoded_matrices(tensors: Sequence[mx.array], tier: Tier) -> ExpertMatrices:
    """Return a packed stack (experts, out, in), whose `tensors` have the order of `encode`. Its
    matrices are decoded to float32 when they are used."""
    packed, *scales = _wide(tensors)

    def times(rows: mx.array, expert: int) -> mx.array:
        one = slice(expert, expert + 1)  # a view: an index would copy
        return rows @ decode((packed[one], *(x[one] for x in scales)), tier, "F32").squeeze(0).T

    width = packed.shape[-1] * 32 // tier.bits
    return ExpertMatrices((*packed.shape[:-1], width), times)


def linear_product(times: Callable[[mx.array], mx.array]) -> Product:
    """Return the product with a matrix (out, in): `times` multiplies rows (..., in) by it."""

    def linear(module: Any, x: mx.array) -> mx.array:
        return _biased(module, times(x))

    return linear


def plain_product(weight: mx.array) -> Product:
    """Return the product with a matrix `weight` (out, in)."""
    return linear_product(lambda x: x @ weight.T)


def experts_product(weight: ExpertMatrices) -> Product:
    """Return the product with a stack (experts, out, in), a matrix at a time."""

    def experts(module: Any, *args: Any, **kwargs: Any) -> mx.array:
        return switch_product(module, weight, *args, **kwargs)

    return experts


def packed_product(tensors: Sequence[mx.array], tier: Tier) -> Product:
    """Return the product with a packed weight (..., out, in), whose `tensors` have the order of
    `encode`.

    A GPU computes with them as they are, a CPU decodes a matrix at a time.
    """
    if on_cpu() and tensors[0].ndim > 2:
        return experts_product(decoded_matrices(tensors, tier))
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
