"""Measured generation speed and memory of a repo on one machine."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """One run: `generated` tokens after a prompt of `context` tokens, in tokens per second.

    `peak_bytes` is the peak of MLX's memory; `predicted_bytes` are weights and KV cache alone, None
    if the config does not determine the size of the cache.
    """

    context: int
    generated: int
    prefill_per_second: float
    generated_per_second: float
    peak_bytes: int
    predicted_bytes: int | None


@dataclass(frozen=True)
class Speed:
    """Measured runs on a machine, with the versions of the packages."""

    machine: str
    versions: Mapping[str, str]
    runs: tuple[Run, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the speed as a JSON object."""
        return {
            "machine": self.machine,
            "versions": dict(self.versions),
            "runs": [asdict(run) for run in self.runs],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Speed":
        """Read the object that `to_json` returns. Raises KeyError, TypeError or ValueError."""
        runs = tuple(
            Run(
                int(run["context"]),
                int(run["generated"]),
                float(run["prefill_per_second"]),
                float(run["generated_per_second"]),
                int(run["peak_bytes"]),
                None if run["predicted_bytes"] is None else int(run["predicted_bytes"]),
            )
            for run in data["runs"]
        )
        versions = {str(name): str(number) for name, number in data["versions"].items()}
        return cls(str(data["machine"]), versions, runs)
