"""95% confidence intervals by bootstrap over documents, whose tokens are not independent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from quantkit.artifacts.fidelity import Interval

RESAMPLES = 1000


@dataclass(frozen=True)
class DocumentBootstrap:
    """Documents drawn with replacement.

    `documents` (tokens,) numbers the document of every token from 0, `drawn` (resamples, documents)
    are the numbers of the documents in each resample.
    """

    documents: np.ndarray
    drawn: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, documents: np.ndarray) -> "DocumentBootstrap":
        """Draw resamples of the documents in an array of any shape and numbering."""
        _, numbers = np.unique(documents, return_inverse=True)
        count = int(numbers.max()) + 1
        return cls(numbers.reshape(-1), rng.integers(0, count, (RESAMPLES, count)))

    @property
    def count(self) -> int:
        """The number of documents."""
        return int(self.drawn.shape[1])

    def mean(
        self,
        values: np.ndarray,
        then: Callable[[Any], Any] = lambda x: x,
        most: float = np.inf,
    ) -> Interval:
        """Return the mean of `values` (tokens,) under `then`, which lies between 0 and `most`.

        NaN stands for a token without a value.
        """
        finite = np.isfinite(values)
        totals = np.bincount(self.documents, np.where(finite, values, 0), self.count)
        tokens = np.bincount(self.documents, finite, self.count)
        sizes = np.maximum(tokens[self.drawn].sum(axis=1), 1)
        resampled = then(totals[self.drawn].sum(axis=1) / sizes)
        return self._interval(float(then(totals.sum() / max(tokens.sum(), 1))), resampled, most)

    def ratio(self, values: np.ndarray, others: np.ndarray) -> Interval:
        """Return the mean of `values` over that of `others`, both (tokens,), positive and paired.

        Both means are over the same documents in every resample, so that what documents have in
        common cancels.
        """
        above, below = (np.bincount(self.documents, x, self.count) for x in (values, others))
        resampled = above[self.drawn].sum(axis=1) / below[self.drawn].sum(axis=1)
        return self._interval(float(above.sum() / below.sum()), resampled)

    def quantiles(self, values: np.ndarray, levels: Sequence[float]) -> list[Interval]:
        """Return quantiles of `values` (tokens,), none of them negative."""
        order = np.argsort(values, kind="stable")
        documents, ascending = self.documents[order], values[order]
        times = np.stack([np.bincount(row, minlength=self.count) for row in self.drawn])
        resampled = np.empty((RESAMPLES, len(levels)))
        for i, row in enumerate(times):
            below = np.cumsum(row[documents])
            places = np.searchsorted(below, np.array(levels) * below[-1])
            resampled[i] = ascending[np.minimum(places, len(values) - 1)]
        return [
            self._interval(float(np.quantile(values, level)), resampled[:, i])
            for i, level in enumerate(levels)
        ]

    def _interval(self, value: float, resampled: np.ndarray, most: float = np.inf) -> Interval:
        """Return the interval of a value, its ends percentiles of the resampled ones (resamples,).

        Percentiles are too narrow for few documents: they are widened by sqrt(n / (n - 1)) and by
        Student's quantile over the normal one. A single document gives no interval.
        """
        n = self.count
        if n < 2:
            return Interval(value, None, None)
        low, high = np.quantile(resampled, (0.025, 0.975))
        wider = (n / (n - 1)) ** 0.5 * stdtrit(n - 1, 0.975) / 1.96
        low, high = value - wider * (value - low), value + wider * (high - value)
        return Interval(value, max(0.0, float(low)), min(most, float(high)))
