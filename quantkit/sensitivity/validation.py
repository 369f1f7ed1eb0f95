"""Validate a profile: some entries are measured on held-out text."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.backend import mx
from quantkit.sensitivity.entries import Entry, EntryKey
from quantkit.sensitivity.exact import measure_entries
from quantkit.streaming.layer_runner import StreamingModel


@dataclass(frozen=True)
class ProfileValidation:
    """Predicted and measured KL costs of some random entries, on held-out text.

    `pairs` are (weight, tier, predicted, measured). `seconds_predicted` is the time of the whole
    profile, `seconds_measured` the extrapolated time to measure all of its entries.
    """

    entries: int
    spearman: float
    median_ratio: float
    seconds_predicted: float
    seconds_measured: float
    pairs: tuple[tuple[str, str, float, float], ...]

    def extrapolated(self, entries: int, seconds: float) -> "ProfileValidation":
        """Return the times for all `entries` of a profile that took `seconds`."""
        measured = self.seconds_measured / self.entries * entries
        return replace(self, seconds_predicted=seconds, seconds_measured=measured)


def validate(
    model: StreamingModel,
    profile: SensitivityProfile,
    entries: Sequence[Entry],
    tokens: np.ndarray,
    done: Callable[[str], None],
) -> ProfileValidation:
    """Measure `entries` on `tokens` (sequences, length) that the profile did not read."""
    started = time.monotonic()
    truth = measure_entries(model, mx.array(tokens), entries, done)
    taken = time.monotonic() - started
    predicted_kl = predictions(profile)
    pairs = [(*e.key, predicted_kl[e.key], float(truth[e.key].mean())) for e in entries]
    predicted, measured = (np.array([pair[i] for pair in pairs]) for i in (2, 3))
    return ProfileValidation(
        entries=len(entries),
        spearman=spearman(predicted, measured),
        median_ratio=float(np.median(predicted / np.maximum(measured, 1e-12))),
        seconds_predicted=0.0,
        seconds_measured=taken,
        pairs=tuple(pairs),
    )


def predictions(profile: SensitivityProfile) -> dict[EntryKey, float]:
    """Return the predicted KL divergence of every entry alone, with its expert-shift."""
    return {
        (w.name, cost.tier): cost.kl + profile.expert_shift({w.name: cost.kl})
        for w in profile.weights
        for cost in w.costs
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation of two arrays (n,), with mean ranks for ties; 0 for
    constants.
    """
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in (a, b)]
    scale = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / scale if scale else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(middle[places], np.float64)
