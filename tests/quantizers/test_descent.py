"""Coordinate descent, against numpy and against all other choices."""

import numpy as np
import pytest

from quantkit.backend import mx
from quantkit.formats.affine import AffineWeight
from quantkit.formats.tiers import parse_tier
from quantkit.quantizers import descent
from quantkit.quantizers.descent import descend
from quantkit.quantizers.hessians import objective, row_objective

TIER = parse_tier("q2g32")


@pytest.fixture(scope="module")
def case():
    """(weight (2, 20, 64), Hessians (2, 64, 64), a start to the nearest integers)."""
    rng = np.random.default_rng(0)
    weight = mx.array(rng.normal(size=(2, 20, 64)).astype(np.float32))
    x = rng.normal(size=(2, 300, 64)) @ (np.eye(64) + rng.normal(size=(64, 64)) / 8)
    hessian = mx.array((x.transpose(0, 2, 1) @ x / 300).astype(np.float32))
    groups = np.array(weight).reshape(2, 20, 2, 32)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    scales = (high - low) / 3
    q = np.round((groups - low) / scales).reshape(2, 20, 64).astype(np.uint8)
    start = AffineWeight(*(mx.array(a) for a in (q, scales[..., 0], low[..., 0])))
    return weight, hessian, start


def test_no_row_gets_worse(case):
    weight, hessian, start = case
    fitted = descend(weight, hessian, start, TIER)
    before, after = (row_objective(weight, x.dequantized(TIER), hessian) for x in (start, fitted))
    assert (after <= before).all().item()
    assert after.sum().item() < 0.6 * before.sum().item()
    assert np.array(fitted.q).max() <= 3


def test_no_single_integer_of_the_result_could_be_better(case, monkeypatch):
    monkeypatch.setattr(descent, "_ROUNDS", 60)  # until it stays
    weight, hessian, start = case
    fitted = descend(weight, hessian, start, TIER)
    least = objective(weight, fitted.dequantized(TIER), hessian)[0].item()
    rng = np.random.default_rng(1)
    tried = 0
    for row, column in zip(rng.integers(0, 20, 40), rng.integers(0, 64, 40), strict=True):
        for move in (-1, 1):
            q = np.array(fitted.q).astype(int)
            q[0, row, column] += move
            if 0 <= q[0, row, column] <= 3:
                other = AffineWeight(mx.array(q.astype(np.uint8)), fitted.scales, fitted.biases)
                moved = objective(weight, other.dequantized(TIER), hessian)[0].item()
                assert moved >= least * (1 - 1e-5)
                tried += 1
    assert tried > 40


def test_scales_and_biases_solve_the_least_squares_of_a_row(case, monkeypatch):
    """Against numpy's solution of the whole system, for the integers of the result."""
    monkeypatch.setattr(descent, "_ROUNDS", 60)
    weight, hessian, start = case
    fitted = descend(weight, hessian, start, TIER)
    row, h = np.array(weight[0, 5], np.float64), np.array(hessian[0], np.float64)
    q = np.array(fitted.q[0, 5], np.float64)
    columns = np.zeros((64, 4))
    for g in range(2):
        group = slice(32 * g, 32 * g + 32)
        columns[group, g], columns[group, 2 + g] = q[group], 1
    best = np.linalg.solve(columns.T @ h @ columns, columns.T @ h @ row)
    stored = np.concatenate([np.array(fitted.scales[0, 5]), np.array(fitted.biases[0, 5])])
    errors = [row - columns @ theta for theta in (best, stored)]
    least, reached = (d @ h @ d for d in errors)
    assert least <= reached < 1.001 * least


def test_dead_inputs_and_equal_integers():
    """No curvature and no spread: nothing is divided by nothing."""
    weight = mx.array(np.full((1, 2, 64), 0.5, np.float32))
    hessian = mx.zeros((1, 64, 64))
    start = AffineWeight(
        mx.zeros((1, 2, 64), mx.uint8), mx.zeros((1, 2, 2)), mx.full((1, 2, 2), 0.5)
    )
    fitted = descend(weight, hessian, start, TIER)
    assert mx.array_equal(fitted.dequantized(TIER), weight).item()
