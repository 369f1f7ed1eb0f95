"""How close a quant is to the native model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MEASURED = (
    "kl_mean",
    "kl_median",
    "kl_p95",
    "kl_p999",
    "top1_agreement",
    "perplexity_ratio",
)


@dataclass(frozen=True)
class Interval:
    """A measured value with its 95% confidence interval, None where one sequence gives none."""

    value: float
    low: float | None
    high: float | None

    def to_json(self, name: str) -> dict[str, Any]:
        return {name: self.value, f"{name}_interval": [self.low, self.high]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], name: str) -> "Interval":
        """Read back what `to_json` gave. Raises KeyError, TypeError or ValueError."""
        low, high = (None if end is None else float(end) for end in data[f"{name}_interval"])
        return cls(float(data[name]), low, high)


@dataclass(frozen=True)
class Fidelity:
    """One repo beside the `native` model, over tokens of `sequences` of `text`, drawn by `seed`,
    that it was not made with.

    KL divergences are in nats per token; `top1_agreement` is the share of tokens for which both
    models hold the same token for the most likely; `perplexity_ratio` is the repo's perplexity over
    the native one's. `kl_by_text` has the mean for every kind of text. `quantiles` are the KL
    divergences of 0%, 1%, ... 100% of the tokens.
    """

    repo: str
    native: str
    text: str
    seed: int
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
            "native": self.native,
            "text": self.text,
            "seed": self.seed,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "tokens": self.tokens,
            "sequences": self.sequences,
        }
        for name in _MEASURED:
            found |= getattr(self, name).to_json(name)
        texts = {kind: kl.to_json("kl_mean") for kind, kl in self.kl_by_text.items()}
        return {**found, "texts": texts, "kl_quantiles": list(self.quantiles)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Fidelity":
        """Read back what `to_json` gave. Raises KeyError, TypeError or ValueError."""
        texts = {str(kind): Interval.from_json(kl, "kl_mean") for kind, kl in data["texts"].items()}
        return cls(
            repo=str(data["repo"]),
            native=str(data["native"]),
            text=str(data["text"]),
            seed=int(data["seed"]),
            bytes=int(data["bytes"]),
            bits_per_weight=float(data["bits_per_weight"]),
            tokens=int(data["tokens"]),
            sequences=int(data["sequences"]),
            **{name: Interval.from_json(data, name) for name in _MEASURED},
            kl_by_text=texts,
            quantiles=tuple(float(kl) for kl in data["kl_quantiles"]),
        )
