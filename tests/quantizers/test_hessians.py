"""Hessians: what is shrunk, and what weights aim at when their inputs drift."""

import numpy as np

from quantkit.backend import mx
from quantkit.quantizers.hessians import Hessians, Prior, shrunk


def data(count=300, width=8):
    """Inputs, and native ones that they drift from."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, count, width)).astype(np.float32)
    return x, x @ rng.normal(1, 0.1, (width, width)).astype(np.float32) + 0.1 * noise


def test_the_formula():
    x, native = data()
    both = np.concatenate([x, native - x], axis=1)
    total, pooled, n, w = both[:20].T @ x[:20], both.T @ x / 300, 20, 8
    found = shrunk(mx.array(total), n, mx.array(pooled), Prior(3, 2))
    expected = (total + 3 * w * pooled) / (n + 5 * w)
    expected[:8] += 2 * w * np.diag(np.diag(total)) / n / (n + 5 * w)
    assert np.allclose(np.array(found), expected, atol=1e-5)
    assert np.allclose(
        np.array(shrunk(mx.array(total[:8]), n, mx.array(pooled[:8]), Prior(3, 2))),
        expected[:8],
        atol=1e-5,
    )


def moments(x, native):
    return mx.array(np.concatenate([x, native - x], axis=1).T @ x / len(x))[None]


def test_the_target_makes_up_for_drift():
    """Of the inputs that drifted it gives outputs nearer to the native ones."""
    x, native = data()
    weight = np.random.default_rng(1).normal(size=(1, 5, 8)).astype(np.float32)
    target = np.array(Hessians(moments(x, native)).target(mx.array(weight)))
    wanted = native @ weight[0].T
    before, after = (np.square(wanted - x @ w[0].T).sum() for w in (weight, target))
    assert after < 0.6 * before
    same = Hessians(moments(x, x)[:, :8]).target(mx.array(weight))
    assert np.array_equal(np.array(same), weight)


def test_the_loss():
    x, native = data()
    rng = np.random.default_rng(1)
    weight, values = rng.normal(size=(2, 1, 5, 8)).astype(np.float32)
    found = Hessians(moments(x, native)).loss(mx.array(weight), mx.array(values)).item()
    wanted = native @ weight[0].T
    distance = np.square(wanted - x @ values[0].T).sum()
    fixed = np.square(wanted - x @ weight[0].T).sum()
    energy = np.square(x @ weight[0].T).sum()
    assert np.isclose(found, (distance - fixed) / energy, rtol=1e-3)
