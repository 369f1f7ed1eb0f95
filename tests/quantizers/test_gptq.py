"""Rounding as pure functions, against mlx's own."""

import numpy as np
import pytest

from quantkit.backend import mx
from quantkit.formats.affine import AffineWeight
from quantkit.formats.tiers import TIERS, parse_tier
from quantkit.quantizers.gptq import gptq, gptq_factors, objective, refit
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


@pytest.mark.parametrize("name", ["q2g32", "q3g64", "q4g64", "q8g64"])
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
            refit(weight, hessian, fed_back, tier),
        )
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[2] < 0.4 * costs[0]


def test_groups_in_another_order_come_back_to_their_places(case):
    tier = parse_tier("q3g32")
    weight, hessian = case
    plain = gptq(weight, gptq_factors(hessian, 32), tier, mx.bfloat16)
    ordered = gptq(weight, gptq_factors(hessian, 32, by_size=True), tier, mx.bfloat16)
    assert gptq_factors(hessian, 32, by_size=True).order != (0, 1, 2, 3)
    rough = nearest(weight, tier)
    assert loss(weight, ordered, tier, hessian) < 0.5 * loss(weight, rough, tier, hessian)
    assert loss(weight, ordered, tier, hessian) < loss(weight, plain, tier, hessian)
    assert not mx.array_equal(plain.q, ordered.q).item()


def test_a_refit_solves_the_rows_least_squares(case):
    """Against numpy's solution of the whole system, scales and biases not rounded."""
    tier = parse_tier("q3g64")
    weight, hessian = case
    start = gptq(weight, gptq_factors(hessian, 64), tier, mx.float32)
    fitted = refit(weight, hessian, start, tier)
    row, h = np.array(weight[0, 5], np.float64), np.array(hessian[0], np.float64)
    q = np.array(start.q[0, 5], np.float64)
    columns = np.zeros((128, 4))
    for g in range(2):
        part = slice(64 * g, 64 * g + 64)
        columns[part, g], columns[part, 2 + g] = q[part], 1
    best = np.linalg.solve(columns.T @ h @ columns, columns.T @ h @ row)

    def off(theta):
        d = row - columns @ theta
        return d @ h @ d

    own = np.concatenate([np.array(fitted.scales[0, 5]), np.array(fitted.biases[0, 5])])
    before = np.concatenate([np.array(start.scales[0, 5]), np.array(start.biases[0, 5])])
    assert off(best) <= off(own) < off(before)
    assert off(own) - off(best) < 0.1 * (off(before) - off(best))


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
        refit(values, hessian, gptq(values, gptq_factors(hessian, 32), tier, mx.bfloat16), tier),
    ):
        out = np.array(rounded.dequantized(tier))
        assert np.isfinite(out).all()
        assert np.allclose(out[0, 0], 0.7, rtol=4e-3)
        assert np.allclose(out[0, 1], 0)
        assert out[0, 2, 5] > 500
