"""What every weight of one checkpoint loses in every tier."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from quantkit.artifacts.inventory import SourceId, is_count, source_id
from quantkit.errors import ProfileError
from quantkit.storage.json_files import FORMAT_VERSION

_SKETCH = re.compile(r"(\d{1,10}:([0-9a-f]{8})*)?")
_MOST = 1e6  # nats per token that a loss can be
UNMEASURED = "none"  # the method of a list of possible entries
PROFILE_FILE = "profile.json"
IMPORTANCE_FILE = "importance.safetensors"


@dataclass(frozen=True)
class TierCost:
    """One entry of the table: a weight in `tier` takes `bytes` and costs `kl`.

    `kl` is the mean KL divergence to the native model in nats per token, predicted or measured as
    the profile's method says; `error` is its standard error over the sequences.
    """

    tier: str
    bytes: int
    kl: float
    error: float


@dataclass(frozen=True)
class WeightSensitivity:
    """The losses of one weight in all tiers, largest first.

    `unseen_experts` counts those of a stack to which no calibration token was routed. The stack's
    losses are then an estimate: each such expert counts as if one token had been routed to it.
    """

    name: str
    role: str
    layer: int | None
    storage: str
    parameters: int
    unseen_experts: int
    losses: tuple[TierCost, ...]

    @property
    def estimated(self) -> bool:
        return self.unseen_experts > 0

    @property
    def by_tier(self) -> dict[str, TierCost]:
        return {loss.tier: loss for loss in self.losses}


@dataclass(frozen=True)
class CalibrationText:
    """The text a profile was measured on: how much of it, and the sha256 of its token ids.

    `sketch` is a sample of its passages, by which other text can be told apart from it;
    `skipped_rows` counts the rows that held no text.
    """

    name: str
    licence: str
    sequences: int
    sequence_length: int
    seed: int
    sha256: str
    sketch: str
    skipped_rows: int = 0

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens": self.tokens}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CalibrationText":
        """Read back what `to_json` gave. Raises TypeError for what cannot be one."""
        found = cls(**{key: value for key, value in data.items() if key != "tokens"})
        texts = (found.name, found.licence, found.sha256, found.sketch)
        if not all(isinstance(text, str) for text in texts) or not _SKETCH.fullmatch(found.sketch):
            raise TypeError("the calibration text is not described rightly")
        counts = (found.sequences, found.sequence_length, found.seed, found.skipped_rows)
        if not all(is_count(n) for n in counts):
            raise TypeError("the calibration text has no such size or seed")
        return found


@dataclass(frozen=True)
class SensitivityProfile:
    """Weight x tier -> bytes and KL divergence, for one checkpoint.

    `method` is `fisher` (predicted from one backward pass) or `kl` (measured). `expert_tokens`
    gives, for every stack of experts by its module path, how many tokens each expert saw.
    """

    source: SourceId
    model_type: str
    method: str
    rounding: str
    draws: int
    tiers: tuple[str, ...]
    calibration: CalibrationText
    weights: tuple[WeightSensitivity, ...]
    expert_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        """Whether its losses are known; those of a list of possible entries are not."""
        return self.method != UNMEASURED

    def to_json(self) -> dict[str, Any]:
        weights = [
            {**asdict(weight), "estimated": weight.estimated, "losses": _losses(weight)}
            for weight in self.weights
        ]
        return {
            "kind": "profile",
            "version": FORMAT_VERSION,
            "source": asdict(self.source),
            "model_type": self.model_type,
            "method": self.method,
            "rounding": self.rounding,
            "draws": self.draws,
            "tiers": list(self.tiers),
            "calibration": self.calibration.to_json(),
            "versions": dict(self.versions),
            "expert_tokens": {name: list(seen) for name, seen in self.expert_tokens.items()},
            "weights": weights,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> "SensitivityProfile":
        """Read back what `to_json` gave. Raises ProfileError naming `where`."""
        if data.get("kind") != "profile":
            raise ProfileError(f"{where}: expected a profile, found {data.get('kind')!r}.")
        if data.get("version") != FORMAT_VERSION:
            raise ProfileError(
                f"{where}: profile of version {data.get('version')!r}, this quantkit reads "
                f"{FORMAT_VERSION}. Make it anew: quantkit profile SRC -o {where} --force"
            )
        try:
            return cls(
                source=source_id(data["source"]),
                model_type=data["model_type"],
                method=data["method"],
                rounding=data["rounding"],
                draws=data["draws"],
                tiers=tuple(data["tiers"]),
                calibration=CalibrationText.from_json(data["calibration"]),
                weights=_weights(data["weights"]),
                expert_tokens={k: tuple(v) for k, v in data["expert_tokens"].items()},
                versions=dict(data["versions"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise ProfileError(f"{where}: not a complete profile ({exc}). Make it anew.") from exc


def _losses(weight: WeightSensitivity) -> dict[str, dict[str, Any]]:
    return {
        loss.tier: {"bytes": loss.bytes, "kl": loss.kl, "error": loss.error}
        for loss in weight.losses
    }


def _weights(data: Sequence[Mapping[str, Any]]) -> tuple[WeightSensitivity, ...]:
    weights = tuple(_weight(weight) for weight in data)
    if len({weight.name for weight in weights}) != len(weights):
        raise ValueError("a weight is listed twice")
    return weights


def _weight(data: Mapping[str, Any]) -> WeightSensitivity:
    losses = tuple(TierCost(tier, **loss) for tier, loss in data["losses"].items())
    if not isinstance(data["name"], str) or not is_count(data["unseen_experts"]):
        raise TypeError("a weight is not described rightly")
    for loss in losses:
        numbers = 0 <= loss.kl < _MOST and isfinite(loss.error)
        if not is_count(loss.bytes) or not numbers or isinstance(loss.kl, bool):
            raise ValueError(f"{data['name']}, tier {loss.tier}: no such loss is possible")
    known = ("name", "role", "layer", "storage", "parameters", "unseen_experts")
    return WeightSensitivity(**{key: data[key] for key in known}, losses=losses)
