"""How fast a repo generates on one machine, and in how much memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """`generated` tokens after a prompt of `context`: tokens per second, and bytes.

    `peak_bytes` is the peak of MLX's memory; `predicted_bytes` are weights and KV cache alone, None
    where the config does not say how large the cache is.
    """

    context: int
    generated: int
    prefill_per_second: float
    generated_per_second: float
    peak_bytes: int
    predicted_bytes: int | None


@dataclass(frozen=True)
class Speed:
    """Measured runs; `machine` and `versions` say on what."""

    machine: str
    versions: Mapping[str, str]
    runs: tuple[Run, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "versions": dict(self.versions),
            "runs": [asdict(run) for run in self.runs],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Speed":
        """Read back what `to_json` gave. Raises KeyError, TypeError or ValueError."""
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
