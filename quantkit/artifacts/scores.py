"""Scores of a repo on benchmarks, and their difference to another model on the same items."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.artifacts.fidelity import Interval

RIGHT, WRONG = "right", "wrong"
TRUNCATED, NO_ANSWER, SCORER_ERROR = "truncated", "no final channel", "scorer error"
VERDICTS = (RIGHT, WRONG, TRUNCATED, NO_ANSWER, SCORER_ERROR)
Call = tuple[str, Mapping[str, Any]]
"""The name of a called function, and its arguments."""


@dataclass(frozen=True)
class Answer:
    """An answer: the text of its final channel (None without one), and its calls of functions."""

    final: str | None
    calls: Sequence[Call] = ()
    truncated: bool = False


@dataclass(frozen=True)
class Difference:
    """The difference in accuracy to the model `other`, on the same items.

    `won` and `lost` count the items that only one of both has right, `p` is McNemar's exact
    p-value. A difference below `smallest` could not have been significant with that many flips.
    """

    other: str
    accuracy: float
    difference: Interval
    won: int
    lost: int
    p: float
    smallest: float


@dataclass(frozen=True)
class Score:
    """The accuracy of a model on `items` of a benchmark, with Wilson's interval.

    `verdicts` counts the verdicts of all answers; all but `right` are wrong. `command` is the
    command line that measured it. `whole` tells whether these are all items of the benchmark.
    """

    benchmark: str
    title: str
    items: int
    whole: bool
    accuracy: Interval
    verdicts: Mapping[str, int]
    tokens_per_second: float
    settings: Mapping[str, Any]
    against: Difference | None = None
    command: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the score as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Score":
        """Read the object that `to_json` returns. Raises KeyError, TypeError or ValueError."""
        against = data["against"]
        if against is not None:
            interval = Interval(**against["difference"])
            against = Difference(**{**against, "difference": interval})
        accuracy = Interval(**data["accuracy"])
        return cls(**{**data, "accuracy": accuracy, "against": against})
