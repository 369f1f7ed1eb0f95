import numpy as np
import pytest

from quantkit.evaluation.intervals import DocumentBootstrap


def test_intervals_hold_what_they_say():
    """Documents of other lengths and means, whose tokens are alike: 95% of the intervals contain
    the truth."""
    rng = np.random.default_rng(0)
    for count in (8, 24):
        inside = 0
        for _ in range(200):
            documents = np.repeat(np.arange(count), rng.integers(20, 60, count))
            values = rng.normal(3, 1, count)[documents] + rng.normal(0, 0.1, len(documents))
            interval = DocumentBootstrap.draw(rng, documents).mean(values)
            inside += interval.low < 3 < interval.high
        assert 0.9 < inside / 200 < 0.99


def test_a_single_document_has_no_interval():
    one = DocumentBootstrap.draw(np.random.default_rng(0), np.zeros((2, 8), int))
    assert one.count == 1
    assert one.mean(np.ones(16)).low is None
    assert one.quantiles(np.arange(16.0), [0.5])[0].high is None


def test_tokens_without_a_value_do_not_count():
    drawn = DocumentBootstrap.draw(np.random.default_rng(0), np.array([0, 0, 1, 1]))
    assert drawn.mean(np.array([1.0, np.nan, 3.0, 5.0])).value == 3


@pytest.mark.parametrize("seed", range(20))
def test_ends_are_possible_values(seed):
    """No KL divergence is below 0, and no agreement above 100%."""
    rng = np.random.default_rng(seed)
    drawn = DocumentBootstrap.draw(rng, np.arange(3))
    kl = drawn.mean(rng.exponential(1, 3))
    assert 0 <= kl.low <= kl.value <= kl.high
    share = drawn.mean(1 - rng.exponential(0.02, 3).clip(0, 1), most=1.0)
    assert share.low <= share.value <= share.high <= 1


def test_quantiles_are_those_of_the_tokens():
    rng = np.random.default_rng(0)
    documents, values = rng.integers(0, 40, 4000), rng.exponential(1, 4000)
    median, tail = DocumentBootstrap.draw(rng, documents).quantiles(values, [0.5, 0.95])
    assert median.value == np.quantile(values, 0.5)
    assert median.low < np.log(2) < median.high
    assert tail.low < np.log(20) < tail.high


def test_a_ratio_is_paired():
    """Documents differ by far more than the two methods do, and that cancels."""
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(12), 30)
    hard = np.exp(rng.normal(0, 1, 12))[documents]
    first, second = (hard * share * rng.uniform(0.9, 1.1, 360) for share in (0.9, 1.0))
    drawn = DocumentBootstrap.draw(rng, documents)
    ratio = drawn.ratio(first, second)
    assert ratio.low < 0.9 < ratio.high < 1
    assert ratio.value == pytest.approx(first.mean() / second.mean())
    apart = drawn.mean(first)
    assert ratio.high - ratio.low < 0.1 * (apart.high - apart.low) / apart.value
