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


@mx.custom_function
def cpu_sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + e^-x), of the shape of `x` (...)."""
    y = np.negative(np.asarray(x))
    with np.errstate(over="ignore"):
        np.exp(y, out=y)
    y += 1
    return mx.array(np.reciprocal(y, out=y))


@cpu_sigmoid.vjp
def _sigmoid_vjp(_x: mx.array, gradient: mx.array, y: mx.array) -> mx.array:
    return gradient * y * (1 - y)


@mx.custom_function
def cpu_tanh(x: mx.array) -> mx.array:
    """Return the hyperbolic tangent, of the shape of `x` (...)."""
    return mx.array(np.tanh(np.asarray(x)))


@cpu_tanh.vjp
def _tanh_vjp(_x: mx.array, gradient: mx.array, y: mx.array) -> mx.array:
    return gradient * (1 - y * y)
