"""Experts on the CPU: one plain product per expert instead of mlx's gathered products.

`gather_mm` and `gather_qmm` are slow on the CPU; a float32 matmul uses BLAS.
"""

from typing import Any

import numpy as np

from quantkit.backend import mx


def plain_switch_linear(module: Any) -> Any:
    """Return a replacement for mlx-lm's SwitchLinear with its parameters, for float32 weights.

    It computes with its `instead` in place of its weight, if that is not None: an object with the
    weight's shape, and `times` as in ExpertMatrices.
    """
    from mlx.nn import Module

    class PlainSwitchLinear(Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.instead: Any = None
            self.weight = module.weight
            if "bias" in module:
                self.bias = module.bias

        def __call__(
            self, x: mx.array, indices: mx.array, sorted_indices: bool = False
        ) -> mx.array:
            """Return (..., 1, out) for x (..., 1, in) and indices (...), as SwitchLinear does."""
            weight = self.weight if self.instead is None else self.instead
            return switch_product(self, weight, x, indices, sorted_indices)

    return PlainSwitchLinear()


def switch_product(
    module: Any, weight: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False
) -> mx.array:
    """Return the output (..., 1, out) of mlx-lm's SwitchLinear `module` for `x` (..., 1, in).

    `indices` (...) are the experts; `weight` (experts, out, in) is an array, or an object of that
    shape with `times` as in ExpertMatrices.
    """
    out = (_sorted_product if sorted_indices else _gathered_product)(x, indices, weight)
    if "bias" in module:
        out = out + mx.expand_dims(module.bias[indices], -2)
    return out


def _sorted_product(x: mx.array, indices: mx.array, weight: Any) -> mx.array:
    """Multiply x (n, 1, in), whose rows are sorted by their experts `indices` (n)."""
    counts = np.bincount(np.array(indices), minlength=weight.shape[0])
    by_expert = mx.split(x[:, 0], np.cumsum(counts)[:-1].tolist())
    used = []
    for e, rows in enumerate(by_expert):
        if not counts[e]:
            continue
        if isinstance(weight, mx.array):  # a slice is a view; weight[e] would be a copy
            used.append(rows @ weight[e : e + 1].squeeze(0).T)
        else:
            used.append(weight.times(rows, e))
            mx.eval(used[-1])  # before mlx takes memory for other matrices
    return mx.expand_dims(mx.concatenate(used), -2)


def _gathered_product(x: mx.array, indices: mx.array, weight: Any) -> mx.array:
    """Multiply x (..., 1 or k, 1, in) by the experts `indices` (..., k), for few rows."""
    width = x.shape[-1]
    rows = mx.broadcast_to(x, (*indices.shape, 1, width)).reshape(-1, 1, width)
    flat = indices.reshape(-1)
    order = mx.argsort(flat)
    out = _sorted_product(rows[order], flat[order], weight)[mx.argsort(order)]
    return out.reshape(*indices.shape, 1, weight.shape[1])
