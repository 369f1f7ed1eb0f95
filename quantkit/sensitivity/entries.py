"""The entries of a profile: every weight in every tier that could be worth choosing."""

from collections.abc import Iterable
from dataclasses import dataclass

from quantkit.artifacts.calibration import CalibrationText
from quantkit.artifacts.inventory import Inventory, Weight
from quantkit.artifacts.roles import EXPERT_ROLES
from quantkit.artifacts.sensitivity import (
    UNMEASURED,
    SensitivityProfile,
    TierCost,
    WeightSensitivity,
)
from quantkit.errors import TierError, in_field
from quantkit.formats.tiers import Tier, is_available, native_name, parse_tier, require_available

AFFINE_TIERS = ("q8g64", "q6g64", "q5g64", "q4g32", "q4g64", "q3g32", "q3g64", "q2g32", "q2g64")
ONE_BIT_TIERS = ("q1g32", "q1g64", "q1g128")
_EMBEDDING_TIERS = (*AFFINE_TIERS, "nvfp4", "mxfp4")
_EXPERT_TIERS = (*AFFINE_TIERS, *ONE_BIT_TIERS)
DEFAULT_TIERS = (*AFFINE_TIERS, *ONE_BIT_TIERS, "nvfp4", "mxfp4")
ALL_TIERS = (*DEFAULT_TIERS, "mxfp8")
_ROUTER_TIERS = ("q8g64",)

EntryKey = tuple[str, str]
"""(weight, tier): the key of an entry."""


@dataclass(frozen=True)
class Entry:
    """A weight in a tier, to be measured."""

    weight: Weight
    tier: Tier
    bytes: int

    @property
    def key(self) -> EntryKey:
        return self.weight.name, self.tier.name


def parse_tiers(text: str | None) -> tuple[str, ...] | None:
    """Parse a list such as `q4g64,q3g64`, or `all`. None stays, for the default tiers.

    Raises TierError.
    """
    if text is None:
        return None
    if text.strip() == "all":
        return ALL_TIERS
    with in_field("tiers"):
        tiers = [parse_tier(name) for name in text.split(",") if name.strip()]
    for tier in tiers:
        require_available(tier)
        if not tier.quantized:
            raise TierError(
                f"tier {tier.name} needs no measurement, since it is lossless. Name tiers such as "
                "q4g64."
            )
    if not tiers:
        raise TierError("`tiers` is empty. Name tiers such as q4g64,q3g64, or leave it out.")
    return tuple(dict.fromkeys(tier.name for tier in tiers))


def default_tiers(role: str, routers: bool = False) -> tuple[str, ...]:
    """Return the tiers that are measured by default for weights of a role.

    Calibrated quantizers have affine tiers only, save for embeddings. mxfp8 is left out: q6g64 is
    smaller, and by measurement nearly always better. Only experts may get a single bit. Routers
    have 8 bits, as in all recipes, unless `routers` may get fewer.
    """
    if role == "router" and not routers:
        return _ROUTER_TIERS
    if role == "embedding":
        return _EMBEDDING_TIERS
    return _EXPERT_TIERS if role in EXPERT_ROLES else AFFINE_TIERS


def default_entries(
    weights: Iterable[Weight], more: Iterable[str] = (), routers: bool = False
) -> list[Entry]:
    """Return the entries of the default tiers, and of `more` tiers for all weights."""
    more = tuple(more)
    return [
        entry
        for weight in weights
        for entry in candidate_entries(
            [weight], dict.fromkeys((*default_tiers(weight.role, routers), *more))
        )
    ]


def candidate_entries(weights: Iterable[Weight], tiers: Iterable[str]) -> list[Entry]:
    """Return every fitting tier of the installed mlx that is smaller than the native tier: larger
    ones are never better.
    """
    entries = []
    for weight in weights:
        for tier in map(parse_tier, tiers):
            if is_available(tier) and tier.fits(weight.shape):
                stored = tier.stored_bytes(weight.shape, weight.dtype)
                if stored < weight.bytes:
                    entries.append(Entry(weight, tier, stored))
    return entries


def native_cost(weight: Weight) -> TierCost:
    """Return the cost of leaving a weight in its native tier."""
    return TierCost(native_name(weight.storage), weight.bytes, 0.0, 0.0)


def size_table(
    inventory: Inventory, entries: Iterable[Entry], tiers: Iterable[str]
) -> SensitivityProfile:
    """Return a profile of `tiers` with `entries` at zero KL, to find the possible sizes."""
    rows: dict[str, list[TierCost]] = {}
    for entry in entries:
        rows.setdefault(entry.weight.name, []).append(
            TierCost(entry.tier.name, entry.bytes, 0.0, 0.0)
        )
    weights = []
    for w in inventory.weights:
        costs = (native_cost(w), *rows.get(w.name, []))
        weights.append(
            WeightSensitivity(w.name, w.role, w.layer, w.storage, w.parameters, 0, costs)
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
