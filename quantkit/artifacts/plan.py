"""A tier for every weight of one checkpoint, with exact bytes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from quantkit.artifacts.inventory import SourceId, is_count, source_id
from quantkit.artifacts.profile import CalibrationText
from quantkit.artifacts.roles import ROLES
from quantkit.errors import PlanError
from quantkit.storage.json_files import FORMAT_VERSION, digest, require_kind
from quantkit.units import bits_per_weight


@dataclass(frozen=True)
class Assignment:
    """The tier chosen for one weight, with what that costs.

    `active_bytes` are those read per generated token, None where the config does not say.
    `storage` names the physical tier, which `tier` is too unless it is `native`. `kl` is the loss
    that a profile predicts for it, in nats per token; None without a profile.
    """

    name: str
    role: str
    layer: int | None
    tier: str
    storage: str
    parameters: int
    bytes: int
    active_bytes: int | None
    kl: float | None = None

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
class Optimality:
    """How good a plan is known to be.

    No plan within the limits loses less than `bound`; `gap` is what this one may lose more, over
    its own loss. `price` is what the last bytes were worth: nats per token and byte, for every
    limit in turn. `limits` are what it had to stay within, as text.
    """

    limits: tuple[str, ...]
    bound: float
    gap: float
    prices: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """Weight -> tier for one checkpoint, with exact bytes.

    `origin` says where the tiers came from. The kept tensors (norms, biases, sinks) count in every
    total. `calibration_texts` are the texts it was made with: that of the profile, that of the rounding;
    `rounding` is how numbers are chosen inside a tier, `tuning_steps` how long scales and biases
    were tuned after that; `measured_kl` the divergence of the whole
    plan where it was measured, rounded to nearest.
    """

    source: SourceId
    model_type: str
    origin: str
    choices: tuple[Assignment, ...]
    kept: Assignment
    optimality: Optimality | None = None
    calibration_texts: tuple[CalibrationText, ...] = ()
    rounding: str = "rtn"
    tuning_steps: int = 0
    measured_kl: float | None = None

    @property
    def predicted_kl(self) -> float | None:
        """The sum of the predicted losses, in nats per token; None without a profile."""
        losses = [choice.kl for choice in self.choices]
        return None if None in losses else sum(kl for kl in losses if kl is not None)

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
    def _all(self) -> tuple[Assignment, ...]:
        return (*self.choices, self.kept)

    def tiers(self) -> tuple[TierRow, ...]:
        """The tier table, largest first, the kept tensors last."""
        groups: dict[str, list[Assignment]] = {}
        for choice in self.choices:
            groups.setdefault(choice.label, []).append(choice)
        rows = [self._row(label, choices) for label, choices in groups.items()]
        rows.sort(key=lambda row: (-row.bytes, row.tier))
        if self.kept.parameters:
            rows.append(self._row(self.kept.tier, [self.kept]))
        return tuple(rows)

    def _row(self, label: str, choices: list[Assignment]) -> TierRow:
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
            "predicted_kl": self.predicted_kl,
            "measured_kl": self.measured_kl,
            "optimality": None if self.optimality is None else asdict(self.optimality),
            "rounding": self.rounding,
            "tuning_steps": self.tuning_steps,
            "calibration_texts": [text.to_json() for text in self.calibration_texts],
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
                source=source_id(data["source"]),
                model_type=data["model_type"],
                origin=data["origin"],
                choices=_choices(data["weights"]),
                kept=_choice(data["kept"]),
                optimality=_proof(data.get("optimality")),
                calibration_texts=tuple(
                    map(CalibrationText.from_json, data.get("calibration_texts", []))
                ),
                rounding=str(data.get("rounding", "rtn")),
                tuning_steps=int(data.get("tuning_steps", 0)),
                measured_kl=_loss(data.get("measured_kl")),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise PlanError(f"{where}: not a complete plan ({exc}). Make it anew.") from exc


def tiers_sha256(tiers: Iterable[tuple[str, str]]) -> str:
    """A hash of (weight, tier) pairs in their order."""
    return digest(list(tiers))


def _proof(data: Mapping[str, Any] | None) -> Optimality | None:
    if data is None:
        return None
    limits, prices = tuple(map(str, data["limits"])), tuple(map(float, data["prices"]))
    bound, gap = float(data["bound"]), float(data["gap"])
    if not prices or not all(0 <= number < math.inf for number in (bound, gap, *prices)):
        raise ValueError("its proof is none")
    return Optimality(limits, bound, gap, prices)


def _loss(value: Any) -> float | None:
    """A loss read back. Raises TypeError for what cannot be one."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise TypeError("a loss is no such number")
    return float(value)


def _choices(data: Sequence[Mapping[str, Any]]) -> tuple[Assignment, ...]:
    choices = tuple(_choice(choice) for choice in data)
    if len({choice.name for choice in choices}) != len(choices):
        raise ValueError("a weight is listed twice")
    return choices


def _choice(data: Mapping[str, Any]) -> Assignment:
    choice = Assignment(**data)
    texts = (choice.name, choice.role, choice.tier, choice.storage)
    optional = [n for n in (choice.active_bytes, choice.layer) if n is not None]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"weight {choice.name!r}: a name, role or tier is no text")
    if not all(is_count(number) for number in (choice.parameters, choice.bytes, *optional)):
        raise TypeError(f"weight {choice.name!r}: a count is no whole number")
    return replace(choice, kl=_loss(choice.kl))
