"""Which entries a profile has: every weight in every tier that could be worth choosing."""

from collections.abc import Iterable
from dataclasses import dataclass

from quantkit.artifacts.inventory import Weight
from quantkit.errors import TierError
from quantkit.formats.tiers import Tier, float_dtype, parse_tier

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
ROUNDINGS = ("rtn",)

Key = tuple[str, str]
"""(weight, tier): which entry."""


@dataclass(frozen=True)
class Candidate:
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


def candidates(weights: Iterable[Weight], tiers: Iterable[str]) -> list[Candidate]:
    """Every fitting tier that takes fewer bytes than the weight has now; others could only lose."""
    found = []
    for weight in weights:
        dtype = float_dtype(parse_tier(weight.storage))
        for tier in map(parse_tier, tiers):
            if tier.fits(weight.shape):
                stored = sum(s.nbytes for s in tier.tensors(weight.name, weight.shape, dtype))
                if stored < weight.bytes:
                    found.append(Candidate(weight, tier, stored))
    return found
