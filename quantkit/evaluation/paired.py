"""Statistics of right and wrong answers: intervals, and paired comparisons of two models."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binom, binomtest

from quantkit.artifacts.fidelity import Interval
from quantkit.artifacts.scores import Difference
from quantkit.evaluation.intervals import RESAMPLES

_Z = 1.959964  # of a 95% interval


def wilson(right: float, items: int) -> Interval:
    """Return the share `right` / `items` with Wilson's 95% interval (Wilson 1927)."""
    if items == 0:
        return Interval(0.0, None, None)
    share, z = right / items, _Z**2 / items
    center = (share + z / 2) / (1 + z)
    half = _Z * (share * (1 - share) / items + z / (4 * items)) ** 0.5 / (1 + z)
    return Interval(share, max(0.0, center - half), min(1.0, center + half))


def difference(name: str, ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compare two models on the same items: their scores (items,), each between 0 and 1.

    The interval is a bootstrap over items. `name` is the other model's.
    """
    mine, others = np.array(ours, np.float64), np.array(theirs, np.float64)
    change = mine - others
    won, lost = int((change > 0).sum()), int((change < 0).sum())
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(change), (RESAMPLES, len(change)))
    low, high = np.quantile(change[drawn].mean(axis=1), (0.025, 0.975))
    interval = Interval(float(change.mean()), float(low), float(high))
    flips = won + lost
    return Difference(
        name,
        float(others.mean()),
        interval,
        won,
        lost,
        mcnemar(won, lost),
        _smallest(flips) / len(change),
    )


def mcnemar(won: int, lost: int) -> float:
    """Return the exact two-sided p-value of `won` against `lost` flips (McNemar 1947)."""
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _smallest(flips: int) -> int:
    """Return the least difference of flips that is significant at 5%; with few flips, six.

    Six to none is the first significant result.
    """
    fewest = 6
    if flips < fewest:
        return fewest
    lost = int(binom.ppf(0.025, flips, 0.5))
    while lost >= 0 and mcnemar(flips - lost, lost) >= 0.05:
        lost -= 1
    return flips - 2 * lost
