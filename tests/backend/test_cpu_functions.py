"""Attention and activations on a CPU agree with mlx's, and so do their gradients."""

import numpy as np
import pytest

from quantkit.backend import cpu_functions, mx
from quantkit.backend.cpu_functions import attention, row_dots, sigmoid, speed_up_mlx, tanh

TOKENS, KEYS, HEADS, SHARED = 6, 9, 4, 2
MASKS = {
    "none": None,
    "causal": "causal",
    "bool": mx.arange(3, 9)[:, None] >= mx.arange(KEYS),
    "window, by head": mx.random.bernoulli(0.7, (1, HEADS, TOKENS, KEYS), key=mx.random.key(7)),
    "added": mx.random.normal((2, 1, TOKENS, KEYS), key=mx.random.key(8)),
}


@pytest.mark.parametrize("scores", [4_000_000, 2 * HEADS * KEYS * 4], ids=["whole", "blocks"])
@pytest.mark.parametrize("sinks", [None, mx.array([-1.0, 0.0, 1.0, 40.0])], ids=["plain", "sinks"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_that_of_mlx(mask, sinks, scores, monkeypatch):
    monkeypatch.setattr(cpu_functions, "_SCORES", scores)
    monkeypatch.setattr(cpu_functions, "_FEWEST_ROWS", 1)
    keys = mx.random.split(mx.random.key(0), 4)
    q = mx.random.normal((2, HEADS, TOKENS, 8), key=keys[0])
    k = mx.random.normal((2, SHARED, KEYS, 8), key=keys[1])
    v = mx.random.normal((2, SHARED, KEYS, 5), key=keys[2])
    g = mx.random.normal((2, HEADS, TOKENS, 5), key=keys[3])
    settings = {"scale": 0.3, "mask": MASKS[mask], "sinks": sinks}
    results = []
    for function in (attention, cpu_functions._mlx_attention):
        outputs, gradients = mx.vjp(
            lambda q, k, v, f=function: f(q, k, v, **settings), [q, k, v], [g]
        )
        results.append(outputs + gradients)
    for ours, theirs in zip(*results, strict=True):
        assert np.allclose(np.array(ours), np.array(theirs), atol=2e-6)


def test_other_types_and_devices_are_left_to_mlx(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu_functions, "_mlx_attention", lambda *_, **kw: calls.append(kw) or 1)
    x = mx.zeros((1, 1, 2, 4))
    half = x.astype(mx.bfloat16)
    assert attention(half, half, half, scale=1.0, mask=None) == 1
    monkeypatch.setattr(cpu_functions, "on_cpu", lambda: False)
    assert attention(x, x, x, scale=1.0, mask="causal", sinks=None) == 1
    assert calls == [
        {"scale": 1.0, "mask": None},
        {"scale": 1.0, "mask": "causal", "sinks": None},
    ]


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_activations_are_those_of_mlx(name):
    ours, theirs = getattr(cpu_functions, name), getattr(cpu_functions, f"_mlx_{name}")
    x = mx.concatenate([mx.linspace(-120, 120, 997), mx.array([-mx.inf, mx.inf])])
    g = mx.random.normal(x.shape, key=mx.random.key(3))
    pairs = [mx.vjp(function, [x], [g]) for function in (ours, theirs)]
    for one, other in zip(*(values + gradients for values, gradients in pairs), strict=True):
        assert np.allclose(np.array(one), np.array(other), rtol=1e-6, atol=5e-7)
    half = x.astype(mx.bfloat16)
    assert mx.array_equal(ours(half), theirs(half))


def test_mlx_lm_s_activations_use_them(monkeypatch):
    from mlx.nn import gelu_approx
    from mlx_lm.models.activations import swiglu_oai

    x = mx.random.normal((3, 8), key=mx.random.key(4))
    before = [swiglu_oai(x, x), gelu_approx(x)]
    calls = []
    for name, function in (("sigmoid", sigmoid), ("tanh", tanh)):
        monkeypatch.setattr(
            cpu_functions, name, lambda x, f=function, n=name: calls.append(n) or f(x)
        )
    speed_up_mlx()
    after = [swiglu_oai(x, x), gelu_approx(x)]
    monkeypatch.undo()
    speed_up_mlx()
    assert calls == ["sigmoid", "tanh"]
    assert all(mx.allclose(a, b, atol=1e-6) for a, b in zip(after, before, strict=True))


def test_row_dots(monkeypatch):
    a, b = (mx.random.normal(shape, key=mx.random.key(5)) for shape in ((2, 3, 4, 7), (3, 4, 7)))
    ours = row_dots(a, b)
    monkeypatch.setattr(cpu_functions, "on_cpu", lambda: False)
    assert mx.allclose(ours, row_dots(a, b), atol=1e-6)
