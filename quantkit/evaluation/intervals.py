"""95% confidence intervals by bootstrap over sequences."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import stdtrit

from quantkit.artifacts.fidelity import Interval

RESAMPLES = 1000


def resamples(rng: np.random.Generator, sequences: int) -> np.ndarray:
    """Draw sequences with replacement: indices (resamples, sequences)."""
    return rng.integers(0, sequences, (RESAMPLES, sequences))


def mean_interval(
    by_sequence: np.ndarray,
    drawn: np.ndarray,
    then: Callable[[Any], Any] = lambda x: x,
    most: float = np.inf,
) -> Interval:
    """Return the mean of `by_sequence` (sequences,) under `then`, for indices from `resamples`.

    The values lie between 0 and `most`.
    """
    resampled = then(by_sequence[drawn].mean(axis=1))
    return bootstrap_interval(float(then(by_sequence.mean())), resampled, len(by_sequence), most)


def bootstrap_interval(
    value: float, resampled: np.ndarray, sequences: int, most: float = np.inf
) -> Interval:
    """Return the interval of a value between 0 and `most`.

    Its ends are percentiles of the resampled values (resamples,).

    Percentiles are too narrow for few sequences: they are widened by sqrt(n / (n - 1)) and by
    Student's quantile over the normal one. A single sequence gives no interval.
    """
    if sequences < 2:
        return Interval(value, None, None)
    low, high = np.quantile(resampled, (0.025, 0.975))
    wider = (sequences / (sequences - 1)) ** 0.5 * stdtrit(sequences - 1, 0.975) / 1.96
    low, high = value - wider * (value - low), value + wider * (high - value)
    return Interval(value, max(0.0, float(low)), min(most, float(high)))
