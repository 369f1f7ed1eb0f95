"""The knapsack against brute force."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.planning.knapsack import ImpossibleError, solve
from quantkit.planning.knapsack_items import Option, undominated

LOSSES = st.one_of(st.sampled_from([0.0, 0.1, 0.2]), st.floats(0, 1))


@st.composite
def instances(draw):
    """(items, limits): few items, one or two limits, many ties."""
    limits = draw(st.integers(1, 2))
    option = st.builds(Option, st.tuples(*[st.integers(1, 30)] * limits), LOSSES)
    items = draw(st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5))
    return items, [draw(st.integers(1, 90)) for _ in range(limits)]


@st.composite
def models(draw):
    """Items in a few shapes, as a model's weights: the same costs, on a line, other losses."""
    limits = draw(st.integers(1, 2))
    items = []
    for _ in range(draw(st.integers(1, 3))):
        base, step = (draw(st.tuples(*[st.integers(1, 9)] * limits)) for _ in range(2))
        levels = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
        for _ in range(draw(st.integers(1, 3))):
            costs = [tuple(b + n * s for b, s in zip(base, step, strict=True)) for n in levels]
            items.append([Option(cost, draw(LOSSES)) for cost in costs])
    return items[:6], [draw(st.integers(1, 120)) for _ in range(limits)]


def best(items, limits):
    """The least loss of all choices within the limits; None if there is none."""
    found = None
    for choice in itertools.product(*items):
        used = [sum(option.costs[k] for option in choice) for k in range(len(limits))]
        if all(u <= limit for u, limit in zip(used, limits, strict=True)):
            kl = sum(option.kl for option in choice)
            found = kl if found is None else min(found, kl)
    return found


@settings(max_examples=400, deadline=None)
@given(st.one_of(instances(), models()))
def test_the_optimum_is_that_of_brute_force(instance):
    items, limits = instance
    expected = best(items, limits)
    if expected is None:
        with pytest.raises(ImpossibleError):
            solve(items, limits)
        return
    found = solve(items, limits)
    chosen = [item[number] for item, number in zip(items, found.chosen, strict=True)]
    assert found.kl == pytest.approx(expected, abs=1e-9)
    assert found.kl == pytest.approx(sum(option.kl for option in chosen), abs=1e-12)
    for k, limit in enumerate(limits):
        assert sum(option.costs[k] for option in chosen) <= limit
    assert found.gap <= 1e-9
    assert solve(items, limits) == found


@settings(max_examples=100, deadline=None)
@given(instances())
def test_dominated_options_stand_in_no_optimum(instance):
    items, limits = instance
    kept = [[item[i] for i in undominated(item)] for item in items]
    assert best(kept, limits) == best(items, limits)


def test_only_dominated_options_are_dropped():
    """One off the convex hull stays: it may be the one that fits."""
    options = [Option((10,), 0.0), Option((6,), 0.9), Option((5,), 1.0), Option((6,), 1.5)]
    assert undominated(options) == [0, 1, 2]
    assert undominated([options[0], options[0]]) == [0]
    other = [Option((4,), 0.0)]
    assert solve([options, other], [10]).chosen == (1, 0)


def test_equal_items_get_their_options_in_order():
    item = [Option((2,), 0.0), Option((1,), 1.0)]
    assert solve([item] * 4, [6]).chosen == (0, 0, 1, 1)


def test_what_is_impossible_says_what_is_needed():
    with pytest.raises(ImpossibleError) as refused:
        solve([[Option((5, 1), 0.0)], [Option((7, 2), 0.0), Option((6, 9), 1.0)]], [10, 2])
    assert refused.value.least == (11, 3)


def large(weights, seed=0, limits=1):
    """Options as a model's: tiers of 16 to 2.5 bits, losses falling with the bits."""
    rng = np.random.default_rng(seed)
    bits = np.array([16, 8.5, 8.25, 6.5, 5.5, 5, 4.5, 4.25, 4, 3.5, 3, 2.5])
    items = []
    for _ in range(weights):
        size, importance = 64 * int(rng.integers(10**5, 5 * 10**6)), np.exp(2 * rng.normal())
        share = rng.random()
        losses = importance * np.exp(-1.3 * bits + 0.2 * rng.normal(size=12))
        losses[0] = 0
        costs = (size * bits / 8).astype(int)
        rows = [(int(c), int(c * share))[:limits] for c in costs]
        items.append([Option(c, float(x)) for c, x in zip(rows, losses, strict=True)])
    return items


@pytest.mark.parametrize("share", [32, 36, 41, 45])
def test_weights_of_a_few_shapes(share):
    """The 120b: stacks of experts and projections, many of each size. Steps of one size leave a
    gap to the relaxation that no search closes; merged, they leave none."""
    rng = np.random.default_rng(0)
    bits = np.array([16, 8.5, 8.25, 6.5, 5.5, 5, 4.5, 4.25, 4, 3.5, 3, 2.5])
    items = []
    for size, count, tiers in (
        (10**9, 108, bits[7:]),
        (11 * 10**6, 72, bits),
        (1474560, 72, bits),
        (579 * 10**6, 2, bits),
    ):
        for _ in range(count):
            losses = (
                size
                / 10**9
                * np.exp(rng.normal() - 1.3 * tiers + 0.2 * rng.normal(size=len(tiers)))
            )
            losses[0] = 0
            items.append(
                [Option((int(size * b / 8),), float(x)) for b, x in zip(tiers, losses, strict=True)]
            )
    whole = sum(item[0].costs[0] for item in items)
    started = time.monotonic()
    found = solve(items, [whole * 2 * share // 100])
    assert found.gap < 1e-9
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(("weights", "limits"), [(254, 1), (254, 2), (10000, 1)])
def test_models_of_any_size_are_solved_to_optimality(weights, limits):
    items = large(weights, limits=limits)
    whole = [sum(item[0].costs[k] for item in items) for k in range(limits)]
    started = time.monotonic()
    found = solve(items, [w * 27 // 100 if k == 0 else w // 4 for k, w in enumerate(whole)])
    assert found.gap < 1e-9
    assert time.monotonic() - started < 60  # no endless search; evals/bench has the times
