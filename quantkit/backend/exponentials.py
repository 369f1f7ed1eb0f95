"""Exponentials in float32.

On a CPU mlx computes them a value at a time, some 20 times slower than numpy does.
"""

import numpy as np

from quantkit.backend import mx, on_cpu


def exp(x: mx.array) -> mx.array:
    """Return e^x, of the shape of `x` (...); evaluated on a CPU, and without a gradient."""
    return mx.array(np.exp(np.asarray(x))) if on_cpu() else mx.exp(x)


def expm1(x: mx.array) -> mx.array:
    """Return e^x - 1, of the shape of `x` (...); evaluated on a CPU, and without a gradient."""
    return mx.array(np.expm1(np.asarray(x))) if on_cpu() else mx.expm1(x)


@mx.custom_function
def cpu_softmax(x: mx.array, more: mx.array) -> mx.array:
    """Return e^x over its sum along the last axis, to which e^`more` is added.

    `x` is (..., n), `more` (..., 1).
    """
    values, other = np.asarray(x), np.asarray(more)
    top = np.maximum(values.max(axis=-1, keepdims=True), other)
    p = np.subtract(values, top)
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True) + np.exp(other - top)
    return mx.array(p)


@cpu_softmax.vjp
def _softmax_vjp(
    _inputs: tuple[mx.array, mx.array], gradient: mx.array, p: mx.array
) -> tuple[mx.array, mx.array]:
    along = p * gradient
    total = along.sum(axis=-1, keepdims=True)
    return along - p * total, (p.sum(axis=-1, keepdims=True) - 1) * total
