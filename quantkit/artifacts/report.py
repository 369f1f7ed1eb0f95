"""What a written repo holds, and how it came to be."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from quantkit.artifacts.fidelity import Fidelity
from quantkit.artifacts.inventory import SourceFile, is_count, source_file
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.speed import Speed
from quantkit.errors import PlanError
from quantkit.storage.json_files import FORMAT_VERSION, require_kind
from quantkit.units import bits_per_weight

REPORT_FILE = "quantkit.json"
_T = TypeVar("_T")
_TEXTS = ("base_model", "repo", "command")


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
class License:
    """What the source's card states: the Hub's id of its licence, and for one that has none of its
    own (`other`) a name and a link."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Report:
    """What a repo holds and how it came to be; `quantkit.json` inside the repo.

    `files` are those beside the shards that mlx-lm reads: config, index, tokenizer and the like.
    `source_config` are the settings of the source's config.json that decide on its attention, as
    they stand there. `base_model` is the source's Hub id, `license` what its card states,
    `command` what was typed, `repo` the Hub id that it was uploaded as; `fidelity` and `speed` are
    what was measured of it.
    All of them are None where they are not known. `cards` are the sha256 of the cards drawn from
    it, by which one that a person has edited is told.
    """

    plan: Plan
    shards: tuple[ShardRecord, ...]
    files: tuple[SourceFile, ...]
    versions: Mapping[str, str]
    source_config: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    license: License | None = None
    command: str | None = None
    memory: Memory | None = None
    repo: str | None = None
    fidelity: Fidelity | None = None
    speed: Speed | None = None
    cards: tuple[str, ...] = ()

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
            "license": None if self.license is None else asdict(self.license),
            "repo": self.repo,
            "command": self.command,
            "fidelity": None if self.fidelity is None else self.fidelity.to_json(),
            "speed": None if self.speed is None else self.speed.to_json(),
            "cards": list(self.cards),
            "tiers": plan["tiers"],
            "weights": plan["weights"],
            "source": plan["source"],
            "shards": [asdict(shard) for shard in self.shards],
            "files": [asdict(file) for file in self.files],
            "versions": dict(self.versions),
            "source_config": dict(self.source_config),
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
            versions["quantkit"]  # every report has it
            source_config = dict(data["source_config"])
            license_ = _optional(data, "license", _license)
            memory = _optional(data, "memory", _memory)
            fidelity = _optional(data, "fidelity", Fidelity.from_json)
            speed = _optional(data, "speed", Speed.from_json)
            cards = tuple(str(sha256) for sha256 in data.get("cards", ()))
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise PlanError(f"{where}: not a complete report ({exc}).") from exc
        return cls(
            Plan.from_json(plan, where),
            shards,
            files,
            versions,
            source_config,
            **known,
            license=license_,
            memory=memory,
            fidelity=fidelity,
            speed=speed,
            cards=cards,
        )


def _optional(data: Mapping[str, Any], name: str, read: Callable[[Any], _T]) -> _T | None:
    return None if data.get(name) is None else read(data[name])


def _optional_text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} is no text")
    return value


def _license(data: Mapping[str, Any]) -> License:
    found = License(**data)
    if not all(value is None or isinstance(value, str) for value in asdict(found).values()):
        raise TypeError("the licence is no text")
    return found


def _memory(data: Mapping[str, Any]) -> Memory:
    found = Memory(**data)
    if not all(value is None or is_count(value) for value in asdict(found).values()):
        raise TypeError("memory holds no whole numbers")
    return found


def shard_record(data: Mapping[str, Any]) -> ShardRecord:
    """A shard's record read back. Raises TypeError for what cannot be one."""
    shard = ShardRecord(**data)
    counts = is_count(shard.size) and is_count(shard.tensor_bytes)
    if not counts or not isinstance(shard.sha256, str) or Path(shard.name).name != shard.name:
        raise TypeError(f"shard {shard.name!r} is not described rightly")
    return shard
