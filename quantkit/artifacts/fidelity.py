"""How close a quant is to the native model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Interval:
    """A measured value with its 95% confidence interval, None where one sequence gives none."""

    value: float
    low: float | None
    high: float | None

    def to_json(self, name: str) -> dict[str, Any]:
        return {name: self.value, f"{name}_interval": [self.low, self.high]}


@dataclass(frozen=True)
class Fidelity:
    """One repo beside the native model, over tokens of `sequences` that it was not made with.

    KL divergences are in nats per token; `top1_agreement` is the share of tokens for which both
    models hold the same token for the most likely; `perplexity_ratio` is the repo's perplexity over
    the native one's. `kl_by_text` has the mean for every kind of text. `quantiles` are the KL
    divergences of 0%, 1%, ... 100% of the tokens.
    """

    repo: str
    bytes: int
    bits_per_weight: float
    tokens: int
    sequences: int
    kl_mean: Interval
    kl_median: Interval
    kl_p95: Interval
    kl_p999: Interval
    top1_agreement: Interval
    perplexity_ratio: Interval
    kl_by_text: Mapping[str, Interval]
    quantiles: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "repo": self.repo,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "tokens": self.tokens,
            "sequences": self.sequences,
        }
        for name in (
            "kl_mean",
            "kl_median",
            "kl_p95",
            "kl_p999",
            "top1_agreement",
            "perplexity_ratio",
        ):
            found |= getattr(self, name).to_json(name)
        texts = {kind: kl.to_json("kl_mean") for kind, kl in self.kl_by_text.items()}
        return {**found, "texts": texts, "kl_quantiles": list(self.quantiles)}
