"""The report of a written repo: its contents, its origin, and its measurements."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from quantkit.artifacts.calibration import ExpertInputs
from quantkit.artifacts.fidelity import Fidelity
from quantkit.artifacts.inventory import SourceFile, is_count, source_file
from quantkit.artifacts.memory import Memory
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.scores import Score
from quantkit.artifacts.speed import Speed
from quantkit.errors import MalformedError, PlanError, fault
from quantkit.storage.json_files import FORMAT_VERSION, require_kind
from quantkit.units import bits_per_weight

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
class License:
    """The licence in the source's card: its Hub id, and name and link if that is `other`."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class SizePoint:
    """The size and the predicted KL divergence of a plan that was not written.

    `recipe` is the name of its recipe, None for the best plan of that size.
    """

    recipe: str | None
    bytes: int
    kl: float

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SizePoint":
        """Read `asdict` of a point. Raises MalformedError or TypeError for anything else."""
        point = cls(**data)
        named = point.recipe is None or isinstance(point.recipe, str)
        if not (named and is_count(point.bytes) and 0 <= float(point.kl) < 1e9):
            raise MalformedError("a point of its frontier is malformed")
        return point


@dataclass(frozen=True)
class Report:
    """The report of a repo, which is `quantkit.json` inside the repo.

    `files` are the files beside the shards that mlx-lm reads, such as config, index and tokenizer.
    `expert_inputs` tells, by stack, how well a calibrated quantizer knew the inputs of experts.
    `source_config` holds the attention settings of the source's config.json, verbatim. `base_model`
    is the source's Hub id, `command` the command line, `repo` the Hub id of the upload; like
    `license`, `memory`, `fidelity` and `speed` they are None if unknown. `cards` are the sha256 of
    the generated cards, which detect a card edited by hand. `scores` are those on benchmarks.
    `frontier` holds other plans for the source, the best by size and recipes, empty without a
    profile.
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
    expert_inputs: Mapping[str, ExpertInputs] = field(default_factory=dict)
    scores: tuple[Score, ...] = ()
    frontier: tuple[SizePoint, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Tensor bytes on disk, headers aside."""
        return sum(shard.tensor_bytes for shard in self.shards)

    @property
    def sha256s(self) -> dict[str, str | None]:
        """The sha256 of every file that mlx-lm reads, by name."""
        files: dict[str, str | None] = {file.name: file.sha256 for file in self.files}
        return files | {shard.name: shard.sha256 for shard in self.shards}

    @property
    def inputs_per_expert(self) -> str | None:
        """A sentence on the inputs of experts, None for a quantizer that used none."""
        rows = self.expert_inputs.values()
        if not rows:
            return None
        poorest = min(rows, key=lambda row: row.median / row.width)
        least = min(row.least for row in rows)
        return (
            f"{poorest.median:,.0f} for the median expert of the poorest stack "
            f"({poorest.median / poorest.width:.2g} per dimension), {least:,} for the poorest "
            f"expert of {len(rows)} stacks"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
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
            "scores": [score.to_json() for score in self.scores],
            "frontier": [asdict(point) for point in self.frontier],
            "cards": list(self.cards),
            "expert_inputs": {name: asdict(row) for name, row in self.expert_inputs.items()},
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
        """Read the object that `to_json` returns. Raises PlanError naming `where`."""
        require_kind(data, "report", where)
        try:
            plan = {**data["plan"], "weights": data["weights"], "source": data["source"]}
            shards = tuple(shard_record(shard) for shard in data["shards"])
            files = tuple(source_file(file) for file in data["files"])
            versions = {str(name): str(number) for name, number in data["versions"].items()}
            texts = {name: _optional_text(data, name) for name in _TEXTS}
            versions["quantkit"]  # every report has it
            source_config = dict(data["source_config"])
            license_ = _optional(data, "license", _license)
            memory = _optional(data, "memory", Memory.from_json)
            fidelity = _optional(data, "fidelity", Fidelity.from_json)
            speed = _optional(data, "speed", Speed.from_json)
            cards = tuple(str(sha256) for sha256 in data.get("cards", ()))
            scores = tuple(Score.from_json(score) for score in data.get("scores", ()))
            frontier = tuple(SizePoint.from_json(point) for point in data.get("frontier", ()))
            inputs = {str(k): ExpertInputs(**v) for k, v in data.get("expert_inputs", {}).items()}
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise PlanError(f"{where}: not a complete report ({fault(exc)}).") from exc
        return cls(
            Plan.from_json(plan, where),
            shards,
            files,
            versions,
            source_config,
            **texts,
            license=license_,
            memory=memory,
            fidelity=fidelity,
            speed=speed,
            cards=cards,
            expert_inputs=inputs,
            scores=scores,
            frontier=frontier,
        )


def _optional(data: Mapping[str, Any], name: str, read: Callable[[Any], _T]) -> _T | None:
    return None if data.get(name) is None else read(data[name])


def _optional_text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise MalformedError(f"{name} is not text")
    return value


def _license(data: Mapping[str, Any]) -> License:
    license_ = License(**data)
    if not all(value is None or isinstance(value, str) for value in asdict(license_).values()):
        raise MalformedError("the licence is not text")
    return license_


def shard_record(data: Mapping[str, Any]) -> ShardRecord:
    """Read `asdict` of a shard record. Raises TypeError for anything else."""
    shard = ShardRecord(**data)
    counts = is_count(shard.size) and is_count(shard.tensor_bytes)
    if not counts or not isinstance(shard.sha256, str) or Path(shard.name).name != shard.name:
        raise MalformedError(f"shard {shard.name!r}: malformed name, size or hash")
    return shard
