"""Rounding as pure functions, against mlx's own."""

import numpy as np
import pytest

from quantkit.backend import mx
from quantkit.formats.affine import AffineWeight
from quantkit.formats.tiers import TIERS, parse_tier
from quantkit.quantizers.descent import descend
from quantkit.quantizers.gptq import gptq, gptq_factors
from quantkit.quantizers.hessians import objective
from quantkit.quantizers.search import search

AFFINE = [name for name, tier in TIERS.items() if tier.mode == "affine" and tier.group_size < 128]


@pytest.fixture(scope="module")
def case():
    """(weight (3, 40, 128), Hessians (3, 128, 128)): inputs that differ in size and go together."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 40, 128)) * np.exp(0.3 * rng.normal(size=(3, 1, 128)))
    mix = np.eye(128) + rng.normal(size=(128, 128)) / 128**0.5
    x = (rng.normal(size=(3, 500, 128)) * np.exp(rng.normal(size=(1, 1, 128)))) @ mix
    hessian = x.transpose(0, 2, 1) @ x / 500
    return mx.array(weight.astype(np.float32)), mx.array(hessian.astype(np.float32))


def nearest(weight, tier):
    """mlx's own choice, as a Rounded."""
    packed, scales, biases = mx.quantize(weight.astype(mx.bfloat16), tier.group_size, tier.bits)
    plain = [part.astype(mx.float32) for part in (scales, biases)]
    values = mx.dequantize(packed, *plain, tier.group_size, tier.bits)
    groups = values.reshape(*values.shape[:-1], -1, tier.group_size)
    s, b = (part[..., None] for part in plain)
    q = mx.round((groups - b) / mx.where(s == 0, 1, s)).reshape(weight.shape).astype(mx.uint8)
    return AffineWeight(q, scales, biases)


def loss(weight, rounded, tier, hessian):
    return objective(weight, rounded.dequantized(tier), hessian).sum().item()


@pytest.mark.parametrize("name", AFFINE)
def test_mlx_reads_what_is_packed(case, name):
    tier = parse_tier(name)
    weight, hessian = case
    rounded = gptq(weight, gptq_factors(hessian, tier.group_size), tier, mx.bfloat16)
    packed, scales, biases = rounded.packed(tier)
    specs = tier.tensors("w", weight.shape, "BF16")
    assert [tuple(part.shape) for part in (packed, scales, biases)] == [s.shape for s in specs]
    assert packed.dtype == mx.uint32
    assert scales.dtype == mx.bfloat16
    wide = (part.astype(mx.float32) for part in (scales, biases))
    values = mx.dequantize(packed, *wide, tier.group_size, tier.bits)
    assert mx.allclose(values, rounded.dequantized(tier), atol=1e-6).item()


@pytest.mark.parametrize("name", AFFINE)
def test_search_is_never_worse_than_to_nearest_by_its_own_measure(case, name):
    tier = parse_tier(name)
    weight, hessian = case
    importance = mx.diagonal(hessian, axis1=-2, axis2=-1)

    def errors(rounded):
        off = importance[..., None, :] * mx.square(weight - rounded.dequantized(tier))
        return off.reshape(*weight.shape[:-1], -1, tier.group_size).sum(axis=-1)

    before = errors(nearest(weight, tier))
    after = errors(search(weight, importance, tier, mx.bfloat16))
    assert (after <= before * (1 + 1e-5)).all().item()
    assert after.sum().item() < 0.95 * before.sum().item()


@pytest.mark.parametrize("name", ["q1g64", "q2g32", "q3g64", "q4g64", "q8g64"])
def test_each_step_loses_less(case, name):
    tier = parse_tier(name)
    weight, hessian = case
    importance = mx.diagonal(hessian, axis1=-2, axis2=-1)
    fed_back = gptq(weight, gptq_factors(hessian, tier.group_size), tier, mx.bfloat16)
    costs = [
        loss(weight, rounded, tier, hessian)
        for rounded in (
            nearest(weight, tier),
            search(weight, importance, tier, mx.bfloat16),
            fed_back,
            descend(weight, hessian, fed_back, tier),
        )
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[2] < 0.4 * costs[0]
    assert costs[3] < 0.97 * costs[2]


def test_groups_come_back_to_their_places(case):
    """The order of the largest inputs is not the stored one here."""
    weight, hessian = case
    tier = parse_tier("q3g32")
    factors = gptq_factors(hessian, 32)
    assert factors.order != (0, 1, 2, 3)
    rounded = gptq(weight, factors, tier, mx.bfloat16)
    rough = nearest(weight, tier)
    assert loss(weight, rounded, tier, hessian) < 0.5 * loss(weight, rough, tier, hessian)


def test_odd_groups():
    """All equal, all zero, and one huge value: nothing is divided by nothing."""
    tier = parse_tier("q2g32")
    weight = np.zeros((1, 3, 64), np.float32)
    weight[0, 0] = 0.7
    weight[0, 2, 5] = 1000
    hessian = mx.eye(64)[None]
    values = mx.array(weight)
    for rounded in (
        search(values, mx.ones((1, 64)), tier, mx.bfloat16),
        descend(values, hessian, gptq(values, gptq_factors(hessian, 32), tier, mx.bfloat16), tier),
    ):
        out = np.array(rounded.dequantized(tier))
        assert np.isfinite(out).all()
        assert np.allclose(out[0, 0], 0.7, rtol=4e-3)
        assert np.allclose(out[0, 1], 0)
        assert out[0, 2, 5] > 500
