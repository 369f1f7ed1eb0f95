"""The sensitivity profile: the KL cost of every weight of a checkpoint in every tier."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import inf, isfinite, sqrt
from statistics import median
from typing import Any

from quantkit.artifacts.calibration import CalibrationText
from quantkit.artifacts.experts import ExpertRanking
from quantkit.artifacts.inventory import SourceId, is_count, source_id
from quantkit.errors import MalformedError, ProfileError, fault
from quantkit.storage.json_files import FORMAT_VERSION

_LARGEST_KL = 1e6  # nats per token
_LARGEST_RATIO = 1e3
UNMEASURED = "none"  # the method of a table that holds sizes only
IMPORTANCE_FILE = "importance.safetensors"

QuantizerRatios = Mapping[str, Mapping[str, Mapping[str, float]]]
"""quantizer -> role -> tier -> its loss on unseen inputs, over that of rounding to nearest."""


@dataclass(frozen=True)
class TierCost:
    """The cost of storing one weight in `tier`: stored bytes, and KL divergence.

    `kl` is the increase of the mean KL divergence to the native model, in nats per token, predicted
    or measured by the method of the profile; `stderr` is its standard error over the sequences.
    """

    tier: str
    bytes: int
    kl: float
    stderr: float


@dataclass(frozen=True)
class WeightSensitivity:
    """The costs of one weight in all tiers, largest tier first.

    `unseen_experts` counts the experts of a stack to which no calibration token was routed. Such a
    stack's costs are estimates: each unseen expert counts as if it had received one token.
    """

    name: str
    role: str
    layer: int | None
    storage: str
    parameters: int
    unseen_experts: int
    costs: tuple[TierCost, ...]

    @property
    def estimated(self) -> bool:
        return self.unseen_experts > 0

    @property
    def by_tier(self) -> dict[str, TierCost]:
        return {cost.tier: cost for cost in self.costs}


@dataclass(frozen=True)
class SensitivityProfile:
    """The table weight x tier -> TierCost of one checkpoint.

    `method` is `fisher` (predicted from one backward pass) or `kl` (measured). `expert_tokens` maps
    the module path of a stack of experts to the number of tokens that each expert received.
    `quantizer_ratios` correct the costs for other quantizers. `expert_rankings` are the rankings of
    all blocks of experts, empty if they were not measured. `expert_shift_factor` is the factor in
    `expert_shift`, None if it was not measured.
    """

    source: SourceId
    model_type: str
    method: str
    quantizer: str
    draws: int
    tiers: tuple[str, ...]
    calibration: CalibrationText
    weights: tuple[WeightSensitivity, ...]
    expert_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    quantizer_ratios: QuantizerRatios = field(default_factory=dict)
    expert_rankings: Mapping[str, ExpertRanking] = field(default_factory=dict)
    expert_shift_factor: float | None = None

    def expert_shift(self, costs: Mapping[str, float]) -> float:
        """Return the KL divergence that changes add to the sum of their costs because later routers
        choose other experts, in nats per token; 0 if its factor was not measured.

        `costs` maps weights to KL costs. A change of cost c moves the logits of the routers behind
        it in proportion to sqrt(c), and so the number of tokens that choose other experts; the
        price of such a choice does not shrink with the change. Changes add up in quadrature:
        factor * sqrt(sum of share * c), `share` being the share of layers behind a weight. EAC-MoE
        (arXiv 2508.01625) names the problem; the formula is measured, see evals/bench/README.md.
        """
        if not self.expert_shift_factor:
            return 0.0
        shares = self._shares_behind
        return self.expert_shift_factor * sqrt(sum(shares[n] * kl for n, kl in costs.items()))

    @cached_property
    def _shares_behind(self) -> dict[str, float]:
        """The share of layers behind each weight, its own layer aside.

        A tied embedding counts as a head, which is most of its cost.
        """
        layers = 1 + max((w.layer for w in self.weights if w.layer is not None), default=0)
        tied = all(weight.role != "lm_head" for weight in self.weights)
        ends = {"embedding": 0.0 if tied else 1.0}
        return {
            w.name: ends.get(w.role, 0.0) if w.layer is None else (layers - 1 - w.layer) / layers
            for w in self.weights
        }

    def quantized_by(self, quantizer: str) -> "SensitivityProfile":
        """Return the profile with the KL costs that are predicted for a quantizer.

        Costs whose ratio is not known stay, and so does a profile made with that quantizer.
        """
        ratios = self.quantizer_ratios.get(quantizer, {})
        if self.quantizer == quantizer or not ratios:
            return self
        weights = []
        for weight in self.weights:
            by_tier = ratios.get(weight.role, {})
            costs = tuple(
                replace(cost, kl=cost.kl * ratio, stderr=cost.stderr * ratio)
                for cost in weight.costs
                for ratio in (by_tier.get(cost.tier, 1.0),)
            )
            weights.append(replace(weight, costs=costs))
        return replace(self, quantizer=quantizer, weights=tuple(weights), quantizer_ratios={})

    @property
    def removal_costs(self) -> dict[int, float]:
        """The KL cost of every measured number of experts to keep, summed over the blocks."""
        costs: dict[int, float] = {}
        for ranking in self.expert_rankings.values():
            costs = {n: costs.get(n, 0.0) + kl for n, kl in ranking.kl.items()}
        return costs

    @property
    def is_measured(self) -> bool:
        """Whether KL costs are known: a table of sizes has zeros instead."""
        return self.method != UNMEASURED

    @property
    def relative_error(self) -> float | None:
        """The standard error of the median entry over its KL cost; None if none has a cost."""
        errors = [cost.stderr / cost.kl for w in self.weights for cost in w.costs if cost.kl > 0]
        return median(errors) if errors else None

    def to_json(self) -> dict[str, Any]:
        """Return the profile as a JSON object."""
        weights = [
            {**asdict(weight), "estimated": weight.estimated, "costs": _costs(weight)}
            for weight in self.weights
        ]
        return {
            "kind": "profile",
            "version": FORMAT_VERSION,
            "source": asdict(self.source),
            "model_type": self.model_type,
            "method": self.method,
            "quantizer": self.quantizer,
            "draws": self.draws,
            "tiers": list(self.tiers),
            "calibration": self.calibration.to_json(),
            "versions": dict(self.versions),
            "expert_tokens": {name: list(seen) for name, seen in self.expert_tokens.items()},
            "quantizer_ratios": self.quantizer_ratios,
            "expert_rankings": {b: r.to_json() for b, r in self.expert_rankings.items()},
            "expert_shift_factor": self.expert_shift_factor,
            "weights": weights,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> "SensitivityProfile":
        """Read the object that `to_json` returns. Raises ProfileError naming `where`."""
        if data.get("kind") != "profile":
            raise ProfileError(f"{where}: expected a profile, found {data.get('kind')!r}.")
        if data.get("version") != FORMAT_VERSION:
            raise ProfileError(
                f"{where}: profile of version {data.get('version')!r}, this quantkit reads "
                f"{FORMAT_VERSION}. Make it again: quantkit profile SRC -o {where} --force"
            )
        try:
            return cls(
                source=source_id(data["source"]),
                model_type=data["model_type"],
                method=data["method"],
                quantizer=data["quantizer"],
                draws=data["draws"],
                tiers=tuple(data["tiers"]),
                calibration=CalibrationText.from_json(data["calibration"]),
                weights=_weights(data["weights"]),
                expert_tokens={k: tuple(v) for k, v in data["expert_tokens"].items()},
                versions=dict(data["versions"]),
                quantizer_ratios=_ratios(data.get("quantizer_ratios", {})),
                expert_rankings={
                    str(block): ExpertRanking.from_json(ranking)
                    for block, ranking in data.get("expert_rankings", {}).items()
                },
                expert_shift_factor=_factor(data.get("expert_shift_factor")),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise ProfileError(
                f"{where}: not a complete profile ({fault(exc)}). Make it again."
            ) from exc


def _costs(weight: WeightSensitivity) -> dict[str, dict[str, Any]]:
    return {
        cost.tier: {"bytes": cost.bytes, "kl": cost.kl, "stderr": cost.stderr}
        for cost in weight.costs
    }


def _factor(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not 0 <= value < inf:
        raise MalformedError("an impossible factor of expert-shift")
    return float(value)


def _ratios(data: Mapping[str, Any]) -> QuantizerRatios:
    for quantizer, roles in data.items():
        for role, tiers in roles.items():
            for tier, ratio in tiers.items():
                if isinstance(ratio, bool) or not 0 <= ratio < _LARGEST_RATIO:
                    raise MalformedError(f"{quantizer}, {role}, {tier}: impossible ratio")
    return data


def _weights(data: Sequence[Mapping[str, Any]]) -> tuple[WeightSensitivity, ...]:
    weights = tuple(_weight(weight) for weight in data)
    if len({weight.name for weight in weights}) != len(weights):
        raise MalformedError("a weight is listed twice")
    return weights


def _weight(data: Mapping[str, Any]) -> WeightSensitivity:
    costs = tuple(TierCost(tier, **cost) for tier, cost in data["costs"].items())
    if not isinstance(data["name"], str) or not is_count(data["unseen_experts"]):
        raise MalformedError("a weight has a malformed name or count")
    for cost in costs:
        possible = 0 <= cost.kl < _LARGEST_KL and isfinite(cost.stderr)
        if not is_count(cost.bytes) or not possible or isinstance(cost.kl, bool):
            raise MalformedError(f"{data['name']}, tier {cost.tier}: impossible cost")
    fields = ("name", "role", "layer", "storage", "parameters", "unseen_experts")
    return WeightSensitivity(**{key: data[key] for key in fields}, costs=costs)
