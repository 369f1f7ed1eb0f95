"""Exponentials, by numpy on a CPU and by mlx elsewhere, are exact."""

import numpy as np

from quantkit.backend import mx
from quantkit.backend.exponentials import cpu_softmax, exp, expm1


def test_exponentials():
    x = mx.concatenate([mx.linspace(-90, 88, 301), mx.array([-mx.inf, 0.0, 1e-9])]).reshape(4, 76)
    assert np.allclose(np.array(exp(x)), np.exp(np.array(x, np.float64)), rtol=1e-6, atol=1e-44)
    assert np.allclose(np.array(expm1(x)), np.expm1(np.array(x, np.float64)), rtol=1e-6, atol=0)


def test_the_gradient_of_the_softmax():
    x = mx.random.normal((3, 5, 7), key=mx.random.key(0))
    more = mx.random.normal((3, 5, 1), key=mx.random.key(1))
    weights = mx.random.normal(x.shape, key=mx.random.key(2))

    def plain(x, more):
        return mx.softmax(mx.concatenate([x, more], axis=-1), axis=-1)[..., :-1]

    pairs = [
        mx.vjp(function, [x, more], [weights]) for function in (lambda *a: cpu_softmax(*a), plain)
    ]
    for ours, theirs in zip(*(values + gradients for values, gradients in pairs), strict=True):
        assert np.allclose(np.array(ours), np.array(theirs), atol=1e-6)
