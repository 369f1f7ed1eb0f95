"""The text that something was calibrated on, as reports name it."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from quantkit.artifacts.inventory import Weight, is_count
from quantkit.errors import MalformedError

_SKETCH = re.compile(r"(\d{1,10}:([0-9a-f]{8})*)?")


@dataclass(frozen=True)
class ExpertInputs:
    """The inputs that the experts of a stack had: of the median expert, the least, and the width.

    A Hessian has as many dimensions as the input is wide.
    """

    median: float
    least: int
    width: int

    @classmethod
    def of(cls, counts: np.ndarray, weight: Weight) -> "ExpertInputs":
        """Summarize the inputs `counts` (experts,) of a stack."""
        return cls(float(np.median(counts)), int(counts.min()), weight.shape[-1])


@dataclass(frozen=True)
class CalibrationText:
    """A calibration text: its name, its size, and the sha256 of its token ids.

    `sketch` samples its passages, which identifies overlapping text; `skipped_rows` counts rows
    without text. The tokens are from `documents` documents (0: not known), all in one `split`.
    """

    name: str
    licence: str
    sequences: int
    sequence_length: int
    seed: int
    sha256: str
    sketch: str
    skipped_rows: int = 0
    split: str = "calibrate"
    documents: int = 0

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length

    def to_json(self) -> dict[str, Any]:
        """Return the text as a JSON object."""
        return {**asdict(self), "tokens": self.tokens}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CalibrationText":
        """Read the object that `to_json` returns. Raises TypeError for anything else."""
        text = cls(**{key: value for key, value in data.items() if key != "tokens"})
        names = (text.name, text.licence, text.sha256, text.sketch, text.split)
        if not all(isinstance(name, str) for name in names) or not _SKETCH.fullmatch(text.sketch):
            raise MalformedError("calibration text: a name, licence, hash or sketch is malformed")
        counts = (text.sequences, text.sequence_length, text.seed, text.skipped_rows)
        if not all(is_count(count) for count in (*counts, text.documents)):
            raise MalformedError("calibration text: a size or seed is not a whole number")
        return text
