"""The values that travel between the stages: inventory, plan, report.

Frozen, printable, and saved as versioned JSON. Tiers appear by name, so that nothing here needs to
know what a tier is.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.errors import PlanError
from quantkit.jsonfile import FORMAT_VERSION, digest, require_kind
from quantkit.roles import EXPERT_ROLES, ROLES
from quantkit.units import bits_per_weight

REPORT_FILE = "quantkit.json"

Progress = Callable[[int, str], None]
"""Called with the bytes just done and the name of what is being done."""


@dataclass(frozen=True)
class SourceFile:
    """One shard of a source; `sha256` is None until it is known (the Hub publishes it)."""

    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class SourceId:
    """Which checkpoint something was made from.

    `structure` hashes config and headers (names, types, shapes), so that the Hub's metadata and a
    downloaded copy agree; the files' own hashes identify the values.
    """

    name: str
    revision: str | None
    structure: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Weight:
    """A quantizable matrix, or a stack of experts, under its mlx-lm module path.

    `shape` is (..., out, in). `storage` names the tier in which the source holds it, `bytes` what
    it takes there.
    """

    name: str
    role: str
    layer: int | None
    layer_kind: str | None
    shape: tuple[int, ...]
    storage: str
    bytes: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that no tier applies to (norm, bias, sink): stored as it is."""

    name: str
    role: str
    layer: int | None
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inventory:
    """Everything a checkpoint holds, in mlx-lm's names and in the order of the model.

    `experts` and `experts_per_token` are None for a model without experts.
    """

    source: SourceId
    model_type: str
    layers: int
    experts: int | None
    experts_per_token: int | None
    weights: tuple[Weight, ...]
    kept: tuple[KeptTensor, ...]

    @property
    def parameters(self) -> int:
        return sum(w.parameters for w in self.weights) + sum(t.parameters for t in self.kept)

    @property
    def total_bytes(self) -> int:
        return sum(w.bytes for w in self.weights) + sum(t.bytes for t in self.kept)

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output head too."""
        return not any(weight.role == "lm_head" for weight in self.weights)

    def active_share(self, role: str, rows: int) -> tuple[int, int] | None:
        """The fraction of a tensor of `rows` rows that one generated token reads.

        An untied embedding gives one row, experts those the router picks, all else is read whole.
        None where the config does not say how many experts a token uses.
        """
        if role in EXPERT_ROLES:
            if self.experts is None or self.experts_per_token is None:
                return None
            return self.experts_per_token, self.experts
        if role == "embedding" and not self.tied:
            return 1, rows
        return 1, 1

    def to_json(self) -> dict[str, Any]:
        weights = [
            {**asdict(weight), "tier": weight.storage, "parameters": weight.parameters}
            for weight in self.weights
        ]
        return {
            "source": asdict(self.source),
            "model_type": self.model_type,
            "layers": self.layers,
            "experts": self.experts,
            "experts_per_token": self.experts_per_token,
            "parameters": self.parameters,
            "total_bytes": self.total_bytes,
            "bits_per_weight": bits_per_weight(self.total_bytes, self.parameters),
            "weights": weights,
            "kept": [asdict(tensor) for tensor in self.kept],
        }


@dataclass(frozen=True)
class Choice:
    """The tier chosen for one weight, with what that costs.

    `active_bytes` are those read per generated token, None where the config does not say.
    `storage` names the physical tier, which `tier` is too unless it is `native`.
    """

    name: str
    role: str
    layer: int | None
    tier: str
    storage: str
    parameters: int
    bytes: int
    active_bytes: int | None

    @property
    def label(self) -> str:
        """The tier as tables show it: `native (mxfp4)`."""
        return f"{self.tier} ({self.storage})" if self.tier == "native" else self.tier


@dataclass(frozen=True)
class TierRow:
    """One line of the published table: what is stored in one tier."""

    tier: str
    roles: tuple[str, ...]
    weights: int
    parameters: int
    parameters_percent: float
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Plan:
    """Weight -> tier for one checkpoint, with exact bytes.

    `origin` says where the tiers came from. The kept tensors (norms, biases, sinks) count in every
    total.
    """

    source: SourceId
    model_type: str
    origin: str
    choices: tuple[Choice, ...]
    kept: Choice

    @property
    def parameters(self) -> int:
        return sum(choice.parameters for choice in self._all)

    @property
    def total_bytes(self) -> int:
        return sum(choice.bytes for choice in self._all)

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(self.total_bytes, self.parameters)

    @property
    def active_bytes(self) -> int | None:
        """Bytes read per generated token, the KV cache aside."""
        active = [choice.active_bytes for choice in self._all]
        return None if None in active else sum(b for b in active if b is not None)

    @property
    def tiers_sha256(self) -> str:
        """What tells an edited plan from the one that was made."""
        return tiers_sha256((choice.name, choice.tier) for choice in self.choices)

    @property
    def _all(self) -> tuple[Choice, ...]:
        return (*self.choices, self.kept)

    def tiers(self) -> tuple[TierRow, ...]:
        """The tier table, largest first, the kept tensors last."""
        groups: dict[str, list[Choice]] = {}
        for choice in self.choices:
            groups.setdefault(choice.label, []).append(choice)
        rows = [self._row(label, choices) for label, choices in groups.items()]
        rows.sort(key=lambda row: (-row.bytes, row.tier))
        if self.kept.parameters:
            rows.append(self._row(self.kept.tier, [self.kept]))
        return tuple(rows)

    def _row(self, label: str, choices: list[Choice]) -> TierRow:
        parameters = sum(choice.parameters for choice in choices)
        stored = sum(choice.bytes for choice in choices)
        present = {choice.role for choice in choices}
        return TierRow(
            tier=label,
            roles=tuple(role for role in (*ROLES, self.kept.role) if role in present),
            weights=len(choices),
            parameters=parameters,
            parameters_percent=100 * parameters / max(1, self.parameters),
            bytes=stored,
            bits_per_weight=bits_per_weight(stored, parameters),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "plan",
            "version": FORMAT_VERSION,
            "source": asdict(self.source),
            "model_type": self.model_type,
            "origin": self.origin,
            "tiers_sha256": self.tiers_sha256,
            "parameters": self.parameters,
            "total_bytes": self.total_bytes,
            "bits_per_weight": self.bits_per_weight,
            "active_bytes_per_token": self.active_bytes,
            "tiers": [asdict(row) for row in self.tiers()],
            "weights": [asdict(choice) for choice in self.choices],
            "kept": asdict(self.kept),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> "Plan":
        """Read back what `to_json` gave. Raises PlanError naming `where`."""
        require_kind(data, "plan", where)
        try:
            return cls(
                source=_source_id(data["source"]),
                model_type=data["model_type"],
                origin=data["origin"],
                choices=tuple(_choice(choice) for choice in data["weights"]),
                kept=_choice(data["kept"]),
            )
        except (KeyError, TypeError, AttributeError) as exc:
            raise PlanError(f"{where}: not a complete plan ({exc}). Make it anew.") from exc


@dataclass(frozen=True)
class ShardRecord:
    """One written shard: `tensor_bytes` is its size without the header."""

    name: str
    size: int
    tensor_bytes: int
    sha256: str


@dataclass(frozen=True)
class Report:
    """What a repo holds and how it came to be; `quantkit.json` inside the repo.

    `files` are those beside the shards that mlx-lm reads: config, index, tokenizer and the like.
    """

    plan: Plan
    shards: tuple[ShardRecord, ...]
    files: tuple[SourceFile, ...]
    versions: Mapping[str, str]

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
            files = tuple(_file(file) for file in data["files"])
            versions = {str(name): str(number) for name, number in data["versions"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise PlanError(f"{where}: not a complete report ({exc}).") from exc
        return cls(Plan.from_json(plan, where), shards, files, versions)


def tiers_sha256(tiers: Iterable[tuple[str, str]]) -> str:
    """A hash of (weight, tier) pairs in their order."""
    return digest(list(tiers))


def with_hashes(source: SourceId, hashes: Mapping[str, str]) -> SourceId:
    """`source` with the sha256 of its files filled in."""
    files = tuple(replace(file, sha256=hashes.get(file.name, file.sha256)) for file in source.files)
    return replace(source, files=files)


def _choice(data: Mapping[str, Any]) -> Choice:
    choice = Choice(**data)
    texts = (choice.name, choice.role, choice.tier, choice.storage)
    optional = [n for n in (choice.active_bytes, choice.layer) if n is not None]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"weight {choice.name!r}: a name, role or tier is no text")
    if not all(_is_count(number) for number in (choice.parameters, choice.bytes, *optional)):
        raise TypeError(f"weight {choice.name!r}: a count is no whole number")
    return choice


def shard_record(data: Mapping[str, Any]) -> ShardRecord:
    """A shard's record read back. Raises TypeError for what cannot be one."""
    shard = ShardRecord(**data)
    counts = _is_count(shard.size) and _is_count(shard.tensor_bytes)
    if not counts or not isinstance(shard.sha256, str) or Path(shard.name).name != shard.name:
        raise TypeError(f"shard {shard.name!r} is not described rightly")
    return shard


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _file(data: Mapping[str, Any]) -> SourceFile:
    file = SourceFile(**data)
    known = file.sha256 is None or isinstance(file.sha256, str)
    if not known or not _is_count(file.size) or Path(file.name).name != file.name:
        raise TypeError(f"file {file.name!r} is not described rightly")
    return file


def _source_id(data: Mapping[str, Any]) -> SourceId:
    files = tuple(_file(file) for file in data["files"])
    return SourceId(data["name"], data["revision"], data["structure"], files)
