"""How far a profile's predictions can be trusted: some entries, really measured."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from quantkit.artifacts.profile import SensitivityProfile
from quantkit.backend import mx
from quantkit.sensitivity.entries import Entry
from quantkit.sensitivity.exact import measured
from quantkit.streaming.layer_runner import StreamingModel


@dataclass(frozen=True)
class Check:
    """Predicted against measured over `entries` random entries of the table, on text held out.

    `seconds_predicted` is what the whole profile took, `seconds_measured` what measuring all of
    its entries would take, extrapolated from those that were.
    """

    entries: int
    spearman: float
    median_ratio: float
    seconds_predicted: float
    seconds_measured: float
    pairs: tuple[tuple[str, str, float, float], ...]


def check(
    model: StreamingModel,
    profile: SensitivityProfile,
    entries: Sequence[Entry],
    held_out: np.ndarray,
    count: int,
    seconds: float,
    done: Callable[[str], None],
) -> Check:
    """Measure `count` of `entries`, drawn at random by the profile's seed, on `held_out` tokens."""
    drawn = np.random.default_rng(profile.calibration.seed).permutation(len(entries))[:count]
    chosen = [entries[i] for i in sorted(drawn.tolist())]
    started = time.monotonic()
    truth = measured(model, mx.array(held_out), chosen, done)
    taken = time.monotonic() - started
    losses = {(w.name, loss.tier): loss.kl for w in profile.weights for loss in w.losses}
    pairs = [(*e.key, losses[e.key], float(truth[e.key].mean())) for e in chosen]
    guess, real = (np.array([pair[i] for pair in pairs]) for i in (2, 3))
    return Check(
        entries=len(chosen),
        spearman=spearman(guess, real),
        median_ratio=float(np.median(guess / np.maximum(real, 1e-12))),
        seconds_predicted=seconds,
        seconds_measured=taken / len(chosen) * len(entries),
        pairs=tuple(pairs),
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. 0 for constants."""
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in (a, b)]
    scale = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / scale if scale else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(middle[places], np.float64)
