"""Experts on the CPU: one plain product per expert instead of mlx's gathered ones.

`gather_mm` and `gather_qmm` are slow on the CPU; a float32 matmul goes through BLAS.
"""

from typing import Any

import numpy as np

from quantkit.backend import mx


def plain_switch_linear(module: Any) -> Any:
    """A stand-in for mlx-lm's SwitchLinear with the same parameters, for float32 weights."""
    from mlx.nn import Module

    class PlainSwitchLinear(Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = module.weight
            if "bias" in module:
                self.bias = module.bias

        def __call__(
            self, x: mx.array, indices: mx.array, sorted_indices: bool = False
        ) -> mx.array:
            """x (..., 1, in) and indices (...) give (..., 1, out), as SwitchLinear does."""
            return switch_product(self, self.weight, x, indices, sorted_indices)

    return PlainSwitchLinear()


def switch_product(
    module: Any, weight: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False
) -> mx.array:
    """What mlx-lm's SwitchLinear `module` gives with `weight` (experts, out, in): an array, or what
    has its shape and gives an expert's matrix for a slice."""
    out = (_sorted_product if sorted_indices else _gathered_product)(x, indices, weight)
    if "bias" in module:
        out = out + mx.expand_dims(module.bias[indices], -2)
    return out


def _sorted_product(x: mx.array, indices: mx.array, weight: Any) -> mx.array:
    """x (n, 1, in), its rows in the order of their experts `indices` (n)."""
    counts = np.bincount(np.array(indices), minlength=weight.shape[0])
    parts = mx.split(x[:, 0], np.cumsum(counts)[:-1].tolist())
    # A slice is looked at where it lies; weight[e] would be a copy.
    used = [part @ weight[e : e + 1].squeeze(0).T for e, part in enumerate(parts) if counts[e]]
    return mx.expand_dims(mx.concatenate(used), -2)


def _gathered_product(x: mx.array, indices: mx.array, weight: Any) -> mx.array:
    """Few rows: x (..., 1 or k, 1, in) against the experts `indices` (..., k)."""
    width = x.shape[-1]
    rows = mx.broadcast_to(x, (*indices.shape, 1, width)).reshape(-1, 1, width)
    flat = indices.reshape(-1)
    order = mx.argsort(flat)
    out = _sorted_product(rows[order], flat[order], weight)[mx.argsort(order)]
    return out.reshape(*indices.shape, 1, weight.shape[1])
