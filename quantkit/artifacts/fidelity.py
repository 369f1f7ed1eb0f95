"""Fidelity: how close a quant is to the native model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EVALUATED_TOKENS = 16384  # by default
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
    """A measured value with its 95% confidence interval, whose ends are None for one sequence."""

    value: float
    low: float | None
    high: float | None

    def percents(self) -> str:
        """Return the value, a share, and its interval in percent."""
        if self.low is None or self.high is None:
            return f"{100 * self.value:.1f}%"
        return f"{100 * self.value:.1f}% ({100 * self.low:.1f} to {100 * self.high:.1f})"

    def to_json(self, name: str) -> dict[str, Any]:
        """Return the entries `name` and `name`_interval."""
        return {name: self.value, f"{name}_interval": [self.low, self.high]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], name: str) -> "Interval":
        """Read the object that `to_json` returns. Raises KeyError, TypeError or ValueError."""
        low, high = (None if end is None else float(end) for end in data[f"{name}_interval"])
        return cls(float(data[name]), low, high)


@dataclass(frozen=True)
class Fidelity:
    """The measured fidelity of one repo to the `native` model, on held-out text.

    `tokens` tokens in `sequences` sequences of `text`, from `documents` documents (0: not known),
    were drawn by `seed`. KL divergences are in
    nats per token. `top1_agreement` is the share of tokens for which both models predict the same
    token, `perplexity_ratio` the repo's perplexity divided by the native one. `kl_by_text` holds
    the mean for every kind of text, `quantiles` the KL divergences at 0%, 1%, ... 100% of the
    tokens.
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
    documents: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fidelity as a JSON object."""
        values: dict[str, Any] = {
            "repo": self.repo,
            "native": self.native,
            "text": self.text,
            "seed": self.seed,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "tokens": self.tokens,
            "sequences": self.sequences,
            "documents": self.documents,
        }
        for name in _MEASURED:
            values |= getattr(self, name).to_json(name)
        texts = {kind: kl.to_json("kl_mean") for kind, kl in self.kl_by_text.items()}
        return {**values, "texts": texts, "kl_quantiles": list(self.quantiles)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Fidelity":
        """Read the object that `to_json` returns. Raises KeyError, TypeError or ValueError."""
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
            documents=int(data.get("documents", 0)),
            **{name: Interval.from_json(data, name) for name in _MEASURED},
            kl_by_text=texts,
            quantiles=tuple(float(kl) for kl in data["kl_quantiles"]),
        )
