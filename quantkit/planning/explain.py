"""Explain a plan: its alternatives, the next steps, and its difference to another plan."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from quantkit.artifacts.experts import pruned_inventory
from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.plan import Assignment, Plan
from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.errors import InputError, PlanError
from quantkit.planning.budget import Budget
from quantkit.planning.constraints import Constraints, Group, groups_of, matches

_NEXT = 8  # steps to report


@dataclass(frozen=True)
class Step:
    """A move of a weight, or of tied weights, to another tier.

    `bytes` and `read` are the additional stored bytes and bytes read per token, `saves` the KL that
    it saves (all negative for a smaller tier). `price` is the KL that the budget pays for these
    bytes at the optimum, 0 without a solved budget.
    """

    weights: tuple[str, ...]
    tier: str
    to: str
    bytes: int
    read: int
    saves: float
    price: float

    @property
    def worth(self) -> float:
        """The KL saved divided by the price, or per byte without one.

        A step up pays above 1, a step down below.
        """
        return self.saves / (self.price or self.bytes)


@dataclass(frozen=True)
class Explanation:
    """The shadow prices of the limits, and the next steps.

    `shadow_prices` are the KL decrease per byte of every limit at the optimum, empty without a
    solved budget. `weights` are (assignment, best step up, best step down), None if there is no
    such step. `up` and `down` are the next steps with more or less budget.
    """

    shadow_prices: tuple[float, ...]
    weights: tuple[tuple[Assignment, Step | None, Step | None], ...]
    up: tuple[Step, ...]
    down: tuple[Step, ...]


@dataclass(frozen=True)
class Difference:
    """A weight with different tiers in two plans; bytes and KL are the second less the first."""

    weight: str
    before: str
    after: str
    bytes: int
    kl: float | None


def explain(
    plan: Plan,
    inventory: Inventory,
    profile: SensitivityProfile,
    constraints: Constraints,
    pattern: str = "*",
) -> Explanation:
    """Explain the tiers of the weights that match `pattern`.

    `profile` and `constraints` are the inputs of the plan. Raises InputError if no weight matches.
    """
    if plan.pruning is not None:
        inventory = pruned_inventory(inventory, plan.pruning.kept)
    chosen = [c for c in plan.assignments if matches(pattern, c.name, c.role)]
    if not chosen:
        raise InputError(f"`explain` pattern {pattern!r} matches no weight.")
    prices = plan.optimality.shadow_prices if plan.optimality else ()
    active = None if plan.active_bytes is None else 0
    profile = profile.quantized_by(plan.quantizer)
    constraints = replace(constraints, quantizer=plan.quantizer)
    groups = groups_of(inventory, profile, Budget(0, active_bytes=active), constraints)
    tiers = {assignment.name: assignment.tier for assignment in plan.assignments}
    pairs = [_steps(group, tiers[group.weights[0].name], prices) for group in groups]
    of = {w.name: pair for group, pair in zip(groups, pairs, strict=True) for w in group.weights}
    ups = [up for up, _ in pairs if up is not None]
    downs = [down for _, down in pairs if down is not None]
    return Explanation(
        shadow_prices=prices,
        weights=tuple((c, *of[c.name]) for c in chosen),
        up=tuple(sorted(ups, key=lambda step: (-step.worth, step.weights))[:_NEXT]),
        down=tuple(sorted(downs, key=lambda step: (step.worth, step.weights))[:_NEXT]),
    )


def diff(before: Plan, after: Plan) -> list[Difference]:
    """Return the weights that two plans of one checkpoint store differently.

    Fewer experts take fewer bytes in the same tier; a row without tiers is for the removal itself,
    with the bytes of biases. Raises PlanError.
    """
    old = {assignment.name: assignment for assignment in before.assignments}
    if old.keys() != {assignment.name for assignment in after.assignments}:
        raise PlanError(
            f"these plans are for different checkpoints: one for {before.source.name}, the other "
            f"for {after.source.name}."
        )
    differences = []
    for new in after.assignments:
        was = old[new.name]
        if (was.tier, was.bytes) != (new.tier, new.bytes):
            predicted = was.kl is not None and new.kl is not None
            kl = (new.kl or 0) - (was.kl or 0) if predicted else None
            differences.append(Difference(new.name, was.tier, new.tier, new.bytes - was.bytes, kl))
    if _kept(before) != _kept(after):
        texts = [_experts(plan) for plan in (before, after)]
        kls = [plan.pruning.kl if plan.pruning else 0.0 for plan in (before, after)]
        kl = None if kls[0] is None or kls[1] is None else kls[1] - kls[0]
        more = after.unquantized.bytes - before.unquantized.bytes
        differences.append(Difference("experts kept", texts[0], texts[1], more, kl))
    return differences


def _kept(plan: Plan) -> dict[str, tuple[int, ...]] | None:
    return None if plan.pruning is None else dict(plan.pruning.kept)


def _experts(plan: Plan) -> str:
    pruning = plan.pruning
    return "all" if pruning is None else f"{pruning.count} of {pruning.experts}"


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as a JSON object."""
    return {
        "shadow_prices": list(explanation.shadow_prices),
        "weights": [
            {
                "name": assignment.name,
                "tier": assignment.tier,
                "bytes": assignment.bytes,
                "kl": assignment.kl,
                "up": _json(up),
                "down": _json(down),
            }
            for assignment, up, down in explanation.weights
        ],
        "up": [_json(step) for step in explanation.up],
        "down": [_json(step) for step in explanation.down],
    }


def _json(step: Step | None) -> dict[str, Any] | None:
    return None if step is None else {**asdict(step), "worth": step.worth}


def _steps(group: Group, tier: str, prices: tuple[float, ...]) -> tuple[Step | None, Step | None]:
    """Return (the step up of greatest worth, the step down of least)."""
    if tier not in group.tiers:
        return None, None
    now = group.options[group.tiers.index(tier)]
    steps = []
    for to, option in zip(group.tiers, group.options, strict=True):
        costs = [a - b for a, b in zip(option.costs, now.costs, strict=True)]
        price = sum(p * c for p, c in zip(prices, costs, strict=False))
        names = tuple(weight.name for weight in group.weights)
        read = costs[1] if len(costs) > 1 else 0
        steps.append(Step(names, tier, to, costs[0], read, now.kl - option.kl, price))
    ups = [step for step in steps if step.bytes > 0 and step.saves > 0]
    downs = [step for step in steps if step.bytes < 0]
    return (
        max(ups, key=lambda step: step.worth, default=None),
        min(downs, key=lambda step: step.worth, default=None),
    )
