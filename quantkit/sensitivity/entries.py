"""Which entries a profile has: every weight in every tier that could be worth choosing."""

from collections.abc import Iterable
from dataclasses import dataclass

from quantkit.artifacts.inventory import Inventory, Weight
from quantkit.artifacts.profile import (
    UNMEASURED,
    CalibrationText,
    SensitivityProfile,
    TierCost,
    WeightSensitivity,
)
from quantkit.errors import TierError
from quantkit.formats.tiers import Tier, kept_name, parse_tier

DEFAULT_TIERS = (
    "q8g64",
    "mxfp8",
    "q6g64",
    "q5g64",
    "q4g32",
    "q4g64",
    "nvfp4",
    "mxfp4",
    "q3g32",
    "q3g64",
    "q2g32",
    "q2g64",
)

Key = tuple[str, str]
"""(weight, tier): which entry."""


@dataclass(frozen=True)
class Entry:
    """A weight in a tier: one entry to be measured."""

    weight: Weight
    tier: Tier
    bytes: int

    @property
    def key(self) -> Key:
        return self.weight.name, self.tier.name


def parse_tiers(text: str | None) -> tuple[str, ...]:
    """The names in a list such as `q4g64,q3g64`; the default ones for None. Raises TierError."""
    if text is None:
        return DEFAULT_TIERS
    tiers = [parse_tier(name) for name in text.split(",") if name.strip()]
    for tier in tiers:
        if not tier.quantized:
            raise TierError(
                f"tier {tier.name} is none to measure: what a checkpoint holds loses nothing. "
                "Name tiers such as q4g64."
            )
    if not tiers:
        raise TierError("no tiers are named. Name some such as q4g64,q3g64, or leave --tiers out.")
    return tuple(dict.fromkeys(tier.name for tier in tiers))


def candidates(weights: Iterable[Weight], tiers: Iterable[str]) -> list[Entry]:
    """Every fitting tier that takes fewer bytes than the weight has now; others could only lose."""
    found = []
    for weight in weights:
        for tier in map(parse_tier, tiers):
            if tier.fits(weight.shape):
                stored = tier.stored_bytes(weight.shape, weight.dtype)
                if stored < weight.bytes:
                    found.append(Entry(weight, tier, stored))
    return found


def native_cost(weight: Weight) -> TierCost:
    """The entry of a weight that is kept as it is."""
    return TierCost(kept_name(weight.storage), weight.bytes, 0.0, 0.0)


def unmeasured(inventory: Inventory, tiers: Iterable[str]) -> SensitivityProfile:
    """A profile of all the entries there could be, none of which loses anything: enough to tell
    which sizes are possible."""
    rows: dict[str, list[TierCost]] = {}
    for entry in candidates(inventory.weights, tiers):
        rows.setdefault(entry.weight.name, []).append(
            TierCost(entry.tier.name, entry.bytes, 0.0, 0.0)
        )
    weights = []
    for w in inventory.weights:
        losses = (native_cost(w), *rows.get(w.name, []))
        weights.append(
            WeightSensitivity(w.name, w.role, w.layer, w.storage, w.parameters, 0, losses)
        )
    text = CalibrationText("", "", 0, 0, 0, "", "")
    return SensitivityProfile(
        inventory.source,
        inventory.model_type,
        UNMEASURED,
        "rtn",
        0,
        tuple(tiers),
        text,
        tuple(weights),
    )
