"""What a written repo holds, and how it came to be."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.artifacts.fidelity import Fidelity
from quantkit.artifacts.inventory import SourceFile, is_count, source_file
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.speed import Speed
from quantkit.errors import PlanError
from quantkit.jsonfile import FORMAT_VERSION, require_kind
from quantkit.units import bits_per_weight

REPORT_FILE = "quantkit.json"
_TEXTS = ("base_model", "license", "repo", "command")


@dataclass(frozen=True)
class ShardRecord:
    """One written shard: `tensor_bytes` is its size without the header."""

    name: str
    size: int
    tensor_bytes: int
    sha256: str


@dataclass(frozen=True)
class Memory:
    """What running a repo takes, computed: the weights, the KV cache of `context` tokens, and a
    reserve for activations and all else.

    `smallest_mac_gib` is the memory of the smallest Mac whose GPU may hold as much, None if none.
    """

    context: int
    cache_bytes: int
    reserve_bytes: int
    needed_bytes: int
    smallest_mac_gib: int | None


@dataclass(frozen=True)
class Report:
    """What a repo holds and how it came to be; `quantkit.json` inside the repo.

    `files` are those beside the shards that mlx-lm reads: config, index, tokenizer and the like.
    `base_model` is the source's Hub id, `license` what its card states, `command` what was typed,
    `repo` the Hub id that it was uploaded as; `fidelity` and `speed` are what was measured of it.
    All of them are None where they are not known.
    """

    plan: Plan
    shards: tuple[ShardRecord, ...]
    files: tuple[SourceFile, ...]
    versions: Mapping[str, str]
    base_model: str | None = None
    license: str | None = None
    command: str | None = None
    memory: Memory | None = None
    repo: str | None = None
    fidelity: Fidelity | None = None
    speed: Speed | None = None

    @property
    def total_bytes(self) -> int:
        """Tensor bytes on disk: what was written, headers aside."""
        return sum(shard.tensor_bytes for shard in self.shards)

    @property
    def sha256s(self) -> dict[str, str | None]:
        """Name -> sha256 of every file that mlx-lm reads."""
        files: dict[str, str | None] = {file.name: file.sha256 for file in self.files}
        return files | {shard.name: shard.sha256 for shard in self.shards}

    def to_json(self) -> dict[str, Any]:
        plan = self.plan.to_json()
        return {
            "kind": "report",
            "version": FORMAT_VERSION,
            "total_bytes": self.total_bytes,
            "total_gb": round(self.total_bytes / 10**9, 3),
            "total_gib": round(self.total_bytes / 2**30, 3),
            "parameters": self.plan.parameters,
            "bits_per_weight": bits_per_weight(self.total_bytes, self.plan.parameters),
            "active_bytes_per_token": self.plan.active_bytes,
            "memory": None if self.memory is None else asdict(self.memory),
            "base_model": self.base_model,
            "license": self.license,
            "repo": self.repo,
            "command": self.command,
            "fidelity": None if self.fidelity is None else self.fidelity.to_json(),
            "speed": None if self.speed is None else self.speed.to_json(),
            "tiers": plan["tiers"],
            "weights": plan["weights"],
            "source": plan["source"],
            "shards": [asdict(shard) for shard in self.shards],
            "files": [asdict(file) for file in self.files],
            "versions": dict(self.versions),
            "plan": {key: plan[key] for key in plan if key not in ("tiers", "weights", "source")},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> "Report":
        """Read back what `to_json` gave. Raises PlanError naming `where`."""
        require_kind(data, "report", where)
        try:
            plan = {**data["plan"], "weights": data["weights"], "source": data["source"]}
            shards = tuple(shard_record(shard) for shard in data["shards"])
            files = tuple(source_file(file) for file in data["files"])
            versions = {str(name): str(number) for name, number in data["versions"].items()}
            known = {name: _optional_text(data, name) for name in _TEXTS}
            memory = None if data.get("memory") is None else Memory(**data["memory"])
            fidelity = data.get("fidelity") and Fidelity.from_json(data["fidelity"])
            speed = data.get("speed") and Speed.from_json(data["speed"])
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise PlanError(f"{where}: not a complete report ({exc}).") from exc
        return cls(
            Plan.from_json(plan, where),
            shards,
            files,
            versions,
            **known,
            memory=memory,
            fidelity=fidelity,
            speed=speed,
        )


def _optional_text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    return None if value is None else str(value)


def shard_record(data: Mapping[str, Any]) -> ShardRecord:
    """A shard's record read back. Raises TypeError for what cannot be one."""
    shard = ShardRecord(**data)
    counts = is_count(shard.size) and is_count(shard.tensor_bytes)
    if not counts or not isinstance(shard.sha256, str) or Path(shard.name).name != shard.name:
        raise TypeError(f"shard {shard.name!r} is not described rightly")
    return shard
