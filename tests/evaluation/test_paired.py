"""Intervals and paired comparisons, against published values and closed forms."""

import pytest

from quantkit.evaluation.paired import difference, mcnemar, wilson


def test_wilson():
    found = wilson(7, 10)  # Brown, Cai and DasGupta 2001
    assert found.value == 0.7
    assert (found.low, found.high) == pytest.approx((0.3968, 0.8922), abs=1e-4)
    assert wilson(0, 5).low == 0
    assert wilson(5, 5).high == 1


def test_mcnemar():
    assert mcnemar(0, 0) == 1
    assert mcnemar(6, 0) == pytest.approx(2 / 64)
    assert mcnemar(5, 0) > 0.05


def test_a_model_with_itself():
    found = difference("itself", [1, 0, 1], [1, 0, 1])
    assert (found.won, found.lost, found.p) == (0, 0, 1)
    assert found.difference.value == found.difference.low == found.difference.high == 0


def test_flips_both_ways():
    ours, theirs = [1] * 8 + [0] * 2 + [1] * 90, [0] * 8 + [1] * 2 + [1] * 90
    found = difference("other", ours, theirs)
    assert (found.won, found.lost) == (8, 2)
    assert found.difference.value == pytest.approx(0.06)
    assert found.difference.low < 0.06 < found.difference.high
    # With 10 flips, 9 to 1 is the least that is significant.
    assert found.smallest == pytest.approx(0.08)
    assert mcnemar(9, 1) < 0.05 < mcnemar(8, 2)


def test_few_items_show_little():
    assert difference("other", [1, 0], [0, 0]).smallest == 3  # more than there is
