"""Functions that are run again in a backward pass."""

import pytest

from quantkit.backend import mx
from quantkit.streaming.recompute import recomputed

COUNT, WIDTH = 8, 256


def product(x, s):
    """Multiply by a matrix that is made from one value a row."""
    return x @ (s[:, None] * mx.ones((WIDTH, WIDTH)) + 1).T


def chain(function, held):
    def run(x, *scales):
        before = mx.get_active_memory()
        for s in scales:
            x = function(x, s) / WIDTH
            mx.eval(x)
        held.append(mx.get_active_memory() - before)
        return x

    return run


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_gradients_are_the_same_and_no_weight_is_kept(dtype):
    mx.random.seed(0)
    x = mx.random.normal((4, WIDTH)).astype(dtype)
    scales = [mx.random.normal((WIDTH,)).astype(dtype) for _ in range(COUNT)]
    g = mx.random.normal((4, WIDTH)).astype(dtype)
    mx.eval(x, scales, g)
    held, results = [], []
    for function in (product, recomputed(product)):
        (y,), gradients = mx.vjp(chain(function, held), [x, *scales], [g])
        mx.eval(y, gradients)
        results.append([y, *gradients])
    for plain, again in zip(*results, strict=True):
        assert plain.dtype == again.dtype
        assert mx.array_equal(plain, again).item()
    weight = 4 * WIDTH * WIDTH
    assert held[0] > COUNT * weight
    assert held[1] < weight
