"""Assemble a profile from the tables of its stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from quantkit.artifacts.experts import ExpertRanking
from quantkit.artifacts.inventory import Weight
from quantkit.artifacts.sensitivity import (
    QuantizerRatios,
    SensitivityProfile,
    TierCost,
    WeightSensitivity,
)
from quantkit.errors import SourceError
from quantkit.quantizers.registry import RTN
from quantkit.sensitivity.entries import Entry, native_cost
from quantkit.sensitivity.fisher import StageTable
from quantkit.sensitivity.quantizer_losses import Losses, add_losses


@dataclass(frozen=True)
class Assembly:
    """The measured `tables` of new `entries`, and the `existing` profile that they extend."""

    weights: Sequence[Weight]
    entries: Sequence[Entry]
    tables: Sequence[StageTable]
    existing: SensitivityProfile | None = None

    def profile(self, described: SensitivityProfile) -> SensitivityProfile:
        """Return `described` with its table. Raises SourceError for a cost that is not finite."""
        seen = {name: counts for table in self.tables for name, counts in table.seen.items()}
        costs = self._costs(seen)
        before = {}
        if self.existing is not None:
            before = {w.name: w.unseen_experts for w in self.existing.weights}
        rows = []
        for weight in self.weights:
            native = native_cost(weight)
            by_tier = {native.tier: native, **costs.get(weight.name, {})}
            unseen = before.get(weight.name, 0)
            if weight.name in seen:
                unseen = _unseen(seen[weight.name])[0]
            rows.append(_row(weight, by_tier, unseen))
        counts = {
            name: tuple(int(n) for n in number) for name, number in seen.items() if len(number) > 1
        }
        tiers = described.tiers
        ratios = self._quantizer_ratios()
        if self.existing is not None:
            tiers = (*self.existing.tiers, *tiers)
            counts = counts or dict(self.existing.expert_tokens)
        return replace(
            described,
            tiers=tuple(dict.fromkeys(tiers)),
            weights=tuple(rows),
            expert_tokens=counts,
            quantizer_ratios=ratios,
            expert_rankings=self._expert_rankings(),
        )

    def _expert_rankings(self) -> Mapping[str, ExpertRanking]:
        """Return the new rankings, or else the existing ones."""
        rankings = {}
        for table in self.tables:
            for block, order in table.rankings.items():
                costs = {c: _mean(kl) for (b, c), kl in table.removal.items() if b == block}
                kl, stderr = ({c: cost[i] for c, cost in costs.items()} for i in (0, 1))
                rankings[block] = ExpertRanking(tuple(map(int, order)), kl, stderr)
        if not rankings and self.existing is not None:
            return self.existing.expert_rankings
        return dict(reversed(rankings.items()))  # in the order of the model

    def _quantizer_ratios(self) -> QuantizerRatios:
        """Return the ratios of the existing profile, and of the new entries."""
        table: dict[str, dict[str, dict[str, float]]] = {}
        if self.existing is not None:
            before = self.existing.quantizer_ratios
            table = {
                q: {role: dict(row) for role, row in rows.items()} for q, rows in before.items()
            }
        losses: Losses = {}
        for stage in self.tables:
            add_losses(losses, stage.losses)
        for (quantizer, role, tier), loss in losses.items():
            nearest = losses[RTN, role, tier]
            if quantizer != RTN and nearest > 0:
                table.setdefault(quantizer, {}).setdefault(role, {})[tier] = loss / nearest
        return table

    def _costs(self, seen: Mapping[str, np.ndarray]) -> dict[str, dict[str, TierCost]]:
        """Return weight -> tier -> cost of the existing and the new entries."""
        costs: dict[str, dict[str, TierCost]] = {}
        if self.existing is not None:
            costs = {weight.name: dict(weight.by_tier) for weight in self.existing.weights}
        for entry in self.entries:
            # A tied embedding changes both ends of the model, each with a table.
            terms = [t.costs[entry.key] for t in self.tables if entry.key in t.costs]
            cost = _cost(entry, np.sum(terms, axis=0), _unseen(seen.get(entry.weight.name)))
            costs.setdefault(entry.weight.name, {})[entry.tier.name] = cost
        return costs

    def importance(self) -> dict[str, np.ndarray]:
        """Return the mean squared input per channel (experts, in) of every weight.

        An expert without tokens gets the mean over the other experts' tokens.
        """
        means = {}
        for table in self.tables:
            for name, total in table.importance.items():
                count = table.seen[name].reshape(-1, 1)
                pooled = total.sum(axis=0) / max(1.0, float(count.sum()))
                mean = np.where(count > 0, total / np.maximum(count, 1), pooled)
                means[name] = mean.astype(np.float32)
        return {w.name: means[w.name] for w in self.weights if w.name in means}


def _row(weight: Weight, by_tier: Mapping[str, TierCost], unseen: int) -> WeightSensitivity:
    return WeightSensitivity(
        name=weight.name,
        role=weight.role,
        layer=weight.layer,
        storage=weight.storage,
        parameters=weight.parameters,
        unseen_experts=unseen,
        costs=tuple(sorted(by_tier.values(), key=lambda cost: (-cost.bytes, cost.tier))),
    )


def _unseen(seen: np.ndarray | None) -> tuple[int, int]:
    """Return (experts without tokens, inputs of all experts)."""
    if seen is None or len(seen) == 1:
        return 0, 1
    return int((seen == 0).sum()), int(seen.sum())


def _cost(entry: Entry, values: np.ndarray, unseen: tuple[int, int]) -> TierCost:
    """Return mean and standard error over sequences.

    Each unseen expert counts as if it had one input, at the mean cost of an input to this stack.
    """
    if not np.isfinite(values).all():
        raise SourceError(f"{entry.weight.name}: its KL cost in {entry.tier} is not finite.")
    more = 1 + unseen[0] / max(1, unseen[1])
    kl, stderr = _mean(values)
    if len(values) == 1:
        stderr *= more
    return TierCost(entry.tier.name, entry.bytes, max(0.0, kl * more), stderr)


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Return mean and standard error of costs (sequences,); of a single one, the cost itself."""
    kl = float(values.mean(dtype=np.float64))
    spread = values.std(ddof=1, dtype=np.float64) if len(values) > 1 else abs(kl)
    return kl, float(spread) / len(values) ** 0.5
