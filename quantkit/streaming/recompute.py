"""Functions that keep nothing for their backward pass but their arguments.

While mlx traces a function to differentiate it, an array that depends on an argument keeps all that
it was computed from, even if it is evaluated: for a product with a dequantized weight that is the
weight, three times over. `mx.checkpoint` does not help where values are evaluated inside.
"""

from collections.abc import Callable, Sequence
from typing import cast

from quantkit.backend import mx
from quantkit.formats.codec import to_mx, to_numpy

Function = Callable[..., mx.array]


def recomputed(function: Function) -> Function:
    """Return `function` of arrays of any shape, evaluated at once, and again in a backward pass."""

    @mx.custom_function
    def run(*arguments: mx.array) -> mx.array:
        y = function(*_constants(arguments))
        mx.eval(y)
        return y

    @run.vjp
    def back(
        arguments: tuple[mx.array, ...], cotangent: mx.array, _y: mx.array
    ) -> tuple[mx.array, ...]:
        _, gradients = mx.vjp(function, _constants(arguments), _constants([cotangent]))
        mx.eval(gradients)
        return tuple(_constants(gradients))

    return cast(Function, run)


def _constants(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return the values of arrays, as arrays that depend on nothing."""
    return [to_mx(to_numpy(x), "BF16" if x.dtype == mx.bfloat16 else "F32") for x in arrays]
