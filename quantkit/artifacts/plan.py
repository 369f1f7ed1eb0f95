"""The plan: a tier for every weight of one checkpoint, with exact bytes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from quantkit.artifacts.calibration import CalibrationText
from quantkit.artifacts.experts import KeptExperts, Pruning
from quantkit.artifacts.inventory import SourceId, is_count, source_id
from quantkit.artifacts.memory import MemoryTarget
from quantkit.artifacts.roles import ROLES
from quantkit.errors import MalformedError, PlanError, fault
from quantkit.storage.hashing import digest
from quantkit.storage.json_files import FORMAT_VERSION, require_kind
from quantkit.units import bits_per_weight


@dataclass(frozen=True)
class Assignment:
    """The tier of one weight, and its costs.

    `active_bytes` are the bytes read per generated token, None if the config does not say.
    `storage` is the physical tier, equal to `tier` unless that is `native`. `kl` is the predicted
    KL increase in nats per token, None without a profile.
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
        """The tier as tables show it, such as `native (mxfp4)`."""
        return f"{self.tier} ({self.storage})" if self.tier == "native" else self.tier


@dataclass(frozen=True)
class TierRow:
    """One row of the published table: all weights of one tier."""

    tier: str
    roles: tuple[str, ...]
    weights: int
    parameters: int
    parameters_percent: float
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Optimality:
    """The result of the solver.

    `limits` describe the budget as text. No plan within it has a sum of KL costs below `bound`;
    `gap` is the relative distance of this plan to the bound. `shadow_prices` are the KL decrease
    per additional byte, in nats per token, one for each limit. With expert pruning, `expert_counts`
    are the numbers of experts for which the knapsack was solved.
    """

    limits: tuple[str, ...]
    bound: float
    gap: float
    shadow_prices: tuple[float, ...]
    expert_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The assignment of a tier to every weight of one checkpoint.

    `origin` names the recipe, budget or file that the tiers come from. Unquantized tensors (norms,
    biases, sinks) count in every total. `calibration_texts` are the texts of the profile and of the
    quantizer, `tuning_steps` the steps of scale tuning after it. `measured_kl` is the measured KL
    divergence of the whole plan, rounded to nearest; the predictions are for `kl_quantizer`.
    `memory_target` is the memory that the plan was made for, None if its bytes were given
    otherwise. `pruning` are the experts that it keeps, None for all. `expert_shift` is the part of
    the predicted KL divergence that no single weight has: all changes together make routers choose
    other experts.
    """

    source: SourceId
    model_type: str
    origin: str
    assignments: tuple[Assignment, ...]
    unquantized: Assignment
    optimality: Optimality | None = None
    calibration_texts: tuple[CalibrationText, ...] = ()
    quantizer: str = "rtn"
    kl_quantizer: str = "rtn"
    tuning_steps: int = 0
    measured_kl: float | None = None
    memory_target: MemoryTarget | None = None
    pruning: Pruning | None = None
    expert_shift: float = 0.0

    @property
    def predicted_kl(self) -> float | None:
        """The predicted KL divergence, in nats per token; None without a profile."""
        costs = self.sum_of_costs
        return None if costs is None else costs + self.expert_shift

    @property
    def sum_of_costs(self) -> float | None:
        """The sum of the KL costs, of which the optimum is proven; None without a profile."""
        costs = [assignment.kl for assignment in self.assignments]
        if self.pruning is not None:
            costs.append(self.pruning.kl)
        return None if None in costs else sum(kl for kl in costs if kl is not None)

    @property
    def prediction_caveat(self) -> str | None:
        """For which other quantizer the prediction is; None if it is for the plan's own."""
        if self.kl_quantizer == self.quantizer:
            return None
        if self.kl_quantizer == "rtn":
            return "if rounded to nearest"
        return f"for {self.kl_quantizer}"

    @property
    def parameters(self) -> int:
        """The parameters of the source, over which bits per weight are counted."""
        return self.pruning.source_parameters if self.pruning else self.kept_parameters

    @property
    def kept_parameters(self) -> int:
        """The parameters that the plan stores."""
        return sum(assignment.parameters for assignment in self._all)

    @property
    def total_bytes(self) -> int:
        return sum(assignment.bytes for assignment in self._all)

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(self.total_bytes, self.parameters)

    @property
    def active_bytes(self) -> int | None:
        """Bytes read per generated token, the KV cache aside."""
        active = [assignment.active_bytes for assignment in self._all]
        return None if None in active else sum(b for b in active if b is not None)

    @property
    def tiers_sha256(self) -> str:
        """A hash of the assignments and the kept experts, which detects edited plans."""
        pairs = ((assignment.name, assignment.tier) for assignment in self.assignments)
        return tiers_sha256(pairs, self.pruning.kept if self.pruning else None)

    @property
    def _all(self) -> tuple[Assignment, ...]:
        return (*self.assignments, self.unquantized)

    def tiers(self) -> tuple[TierRow, ...]:
        """Return the tier table, largest tier first, unquantized tensors last."""
        groups: dict[str, list[Assignment]] = {}
        for assignment in self.assignments:
            groups.setdefault(assignment.label, []).append(assignment)
        rows = [self._row(label, assignments) for label, assignments in groups.items()]
        rows.sort(key=lambda row: (-row.bytes, row.tier))
        if self.unquantized.parameters:
            rows.append(self._row(self.unquantized.tier, [self.unquantized]))
        return tuple(rows)

    def _row(self, label: str, assignments: list[Assignment]) -> TierRow:
        parameters = sum(assignment.parameters for assignment in assignments)
        stored = sum(assignment.bytes for assignment in assignments)
        present = {assignment.role for assignment in assignments}
        return TierRow(
            tier=label,
            roles=tuple(role for role in (*ROLES, self.unquantized.role) if role in present),
            weights=len(assignments),
            parameters=parameters,
            parameters_percent=100 * parameters / max(1, self.kept_parameters),
            bytes=stored,
            bits_per_weight=bits_per_weight(stored, parameters),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object."""
        return {
            "kind": "plan",
            "version": FORMAT_VERSION,
            "source": asdict(self.source),
            "model_type": self.model_type,
            "origin": self.origin,
            "tiers_sha256": self.tiers_sha256,
            "parameters": self.parameters,
            "kept_parameters": self.kept_parameters,
            "total_bytes": self.total_bytes,
            "bits_per_weight": self.bits_per_weight,
            "active_bytes_per_token": self.active_bytes,
            "predicted_kl": self.predicted_kl,
            "expert_shift": self.expert_shift,
            "kl_quantizer": self.kl_quantizer,
            "measured_kl": self.measured_kl,
            "memory_target": None if self.memory_target is None else asdict(self.memory_target),
            "optimality": None if self.optimality is None else asdict(self.optimality),
            "pruning": None if self.pruning is None else self.pruning.to_json(),
            "quantizer": self.quantizer,
            "tuning_steps": self.tuning_steps,
            "calibration_texts": [text.to_json() for text in self.calibration_texts],
            "tiers": [asdict(row) for row in self.tiers()],
            "weights": [asdict(assignment) for assignment in self.assignments],
            "unquantized": asdict(self.unquantized),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> "Plan":
        """Read the object that `to_json` returns. Raises PlanError naming `where`."""
        require_kind(data, "plan", where)
        try:
            return cls(
                source=source_id(data["source"]),
                model_type=data["model_type"],
                origin=data["origin"],
                assignments=_assignments(data["weights"]),
                unquantized=_assignment(data["unquantized"]),
                optimality=_optimality(data.get("optimality")),
                calibration_texts=tuple(
                    map(CalibrationText.from_json, data.get("calibration_texts", []))
                ),
                quantizer=str(data.get("quantizer", "rtn")),
                kl_quantizer=str(data.get("kl_quantizer", "rtn")),
                tuning_steps=int(data.get("tuning_steps", 0)),
                measured_kl=_kl(data.get("measured_kl")),
                memory_target=_memory_target(data.get("memory_target")),
                pruning=read_pruning(data),
                expert_shift=_kl(data.get("expert_shift")) or 0.0,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise PlanError(f"{where}: not a complete plan ({fault(exc)}). Make it again.") from exc


def tiers_sha256(tiers: Iterable[tuple[str, str]], kept: KeptExperts | None = None) -> str:
    """Return a hash of (weight, tier) pairs in their order, and of the experts that are kept."""
    pairs = list(tiers)
    return digest(pairs if kept is None else [pairs, sorted(kept.items())])


def read_pruning(data: Mapping[str, Any]) -> Pruning | None:
    """Read the pruning in the JSON object of a plan. Raises MalformedError, KeyError, TypeError."""
    pruning = data.get("pruning")
    return None if pruning is None else Pruning.from_json(pruning)


def _optimality(data: Mapping[str, Any] | None) -> Optimality | None:
    if data is None:
        return None
    limits, prices = tuple(map(str, data["limits"])), tuple(map(float, data["shadow_prices"]))
    bound, gap = float(data["bound"]), float(data["gap"])
    if not prices or not all(0 <= number < math.inf for number in (bound, gap, *prices)):
        raise MalformedError("its optimality holds impossible numbers")
    counts = tuple(map(int, data.get("expert_counts", ())))
    return Optimality(limits, bound, gap, prices, counts)


def _memory_target(data: Mapping[str, Any] | None) -> MemoryTarget | None:
    return None if data is None else MemoryTarget.from_json(data)


def _kl(value: Any) -> float | None:
    """Return a KL divergence read from JSON. Raises TypeError for an impossible one."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise MalformedError(f"{value!r:.20} is not a KL divergence")
    return float(value)


def _assignments(data: Sequence[Mapping[str, Any]]) -> tuple[Assignment, ...]:
    assignments = tuple(_assignment(assignment) for assignment in data)
    if len({assignment.name for assignment in assignments}) != len(assignments):
        raise MalformedError("a weight is listed twice")
    return assignments


def _assignment(data: Mapping[str, Any]) -> Assignment:
    assignment = Assignment(**data)
    texts = (assignment.name, assignment.role, assignment.tier, assignment.storage)
    optional = [n for n in (assignment.active_bytes, assignment.layer) if n is not None]
    if not all(isinstance(text, str) for text in texts):
        raise MalformedError(f"weight {assignment.name!r}: a name, role or tier is not text")
    if not all(is_count(number) for number in (assignment.parameters, assignment.bytes, *optional)):
        raise MalformedError(f"weight {assignment.name!r}: a count is not a whole number")
    return replace(assignment, kl=_kl(assignment.kl))
