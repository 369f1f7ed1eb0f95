"""Products with weights in place of a layer's own."""

import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from quantkit.backend import mx
from quantkit.formats.codec import encode, fake_quantize
from quantkit.formats.tiers import parse_tier
from quantkit.streaming import products


@pytest.mark.parametrize("tier", ["q3g64", "q8g32", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_packed_product_is_that_of_the_values(monkeypatch, tier, on_cpu):
    """On a CPU, which decodes, and by the kernels that a GPU uses."""
    import mlx.nn as nn

    monkeypatch.setattr(products, "on_cpu", lambda: on_cpu)
    tier = parse_tier(tier)
    mx.random.seed(0)
    x, linear = mx.random.normal((5, 64)), nn.Linear(64, 32)
    product = products.packed_product(encode(linear.weight, tier), tier)
    expected = x @ fake_quantize(linear.weight, tier).T + linear.bias
    assert mx.allclose(product(linear, x), expected, atol=1e-4)
    stack = SwitchLinear(64, 32, 3, bias=True)
    stack.bias = mx.random.normal((3, 32))
    product = products.packed_product(encode(stack.weight, tier), tier)
    values = fake_quantize(stack.weight, tier)
    experts = mx.array([[0, 2], [2, 1], [1, 0], [0, 1], [2, 0]])
    inputs = x[:, None, None]
    y = product(stack, inputs, experts)
    expected = (inputs @ values[experts].swapaxes(-1, -2)) + stack.bias[experts][..., None, :]
    assert y.shape == expected.shape
    assert mx.allclose(y, expected, atol=1e-4)
    order = mx.argsort(experts.reshape(-1))
    rows, flat = mx.repeat(x, 2, axis=0)[order][:, None], experts.reshape(-1)[order]
    y = product(stack, rows, flat, sorted_indices=True)
    assert mx.allclose(y[:, 0], expected.reshape(10, 32)[order], atol=1e-4)


def test_a_packed_stack_is_decoded_an_expert_at_a_time(monkeypatch):
    """On a CPU: whatever the number of experts, one is decoded at a time."""
    monkeypatch.setattr(products, "on_cpu", lambda: True)
    tier, experts = parse_tier("q2g64"), 32
    linear = SwitchLinear(256, 512, experts, bias=False)
    product = products.packed_product(encode(linear.weight, tier), tier)
    x, order = mx.random.normal((experts, 1, 256)), mx.arange(experts)
    mx.eval(x, order, linear.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(product(linear, x, order, sorted_indices=True))
    matrix = 4 * 256 * 512
    assert matrix < mx.get_peak_memory() - before < 8 * matrix < linear.weight.nbytes / 3
