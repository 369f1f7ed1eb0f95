import numpy as np
import pytest

from quantkit.evaluation.intervals import mean_interval, resamples


def test_intervals_hold_what_they_say():
    """Sequences with normal means: 95% of the intervals contain the truth."""
    rng = np.random.default_rng(0)
    for sequences in (4, 16):
        inside = 0
        for _ in range(400):
            values = rng.normal(3, 1, sequences)
            interval = mean_interval(values, rng.integers(0, sequences, (400, sequences)))
            inside += interval.low < 3 < interval.high
        assert 0.91 < inside / 400 < 0.99
    assert mean_interval(np.ones(1), np.zeros((10, 1), int)).low is None


@pytest.mark.parametrize("seed", range(20))
def test_ends_are_possible_values(seed):
    """No KL divergence is below 0, and no agreement above 100%."""
    rng = np.random.default_rng(seed)
    kl = mean_interval(rng.exponential(1, 3), resamples(rng, 3))
    assert 0 <= kl.low <= kl.value <= kl.high
    share = mean_interval(1 - rng.exponential(0.02, 3).clip(0, 1), resamples(rng, 3), most=1.0)
    assert share.low <= share.value <= share.high <= 1
