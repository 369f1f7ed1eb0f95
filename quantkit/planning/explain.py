"""Why a plan is as it is, what would change next, and how two plans differ."""

from dataclasses import asdict, dataclass
from typing import Any

from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.plan import Assignment, Plan
from quantkit.artifacts.profile import SensitivityProfile
from quantkit.errors import InputError, PlanError
from quantkit.planning.allocator import Constraints, Group, Limits, groups_of, matches

_NEXT = 8  # steps told of that come next


@dataclass(frozen=True)
class Step:
    """A weight, or some that are tied, moved to another tier.

    `bytes` and `read` are what it takes more of stored bytes and of those read per token, `saves`
    the loss that it saves (all negative for fewer bytes); `price` what that much is worth at the
    optimum, 0 where nothing was solved for.
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
        """Loss saved over the price; per byte where there is none. A step up pays above 1, a step
        down below."""
        return self.saves / (self.price or self.bytes)


@dataclass(frozen=True)
class Explanation:
    """`prices` are what a byte of every limit is worth at the optimum, in nats per token; empty
    where no budget was solved for. `weights` are (choice, the best step up, the best step down),
    None where there is none; `up` and `down` the steps that come next with more or less budget.
    """

    prices: tuple[float, ...]
    weights: tuple[tuple[Assignment, Step | None, Step | None], ...]
    up: tuple[Step, ...]
    down: tuple[Step, ...]


@dataclass(frozen=True)
class Difference:
    """A weight that two plans store in different tiers; the rest is the second less the first."""

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
    """Why the weights that match `pattern` have their tiers. Raises InputError for none.

    `profile` is the one that chose. Only tiers that `constraints` allow are looked at.
    """
    chosen = [c for c in plan.choices if matches(pattern, c.name, c.role)]
    if not chosen:
        raise InputError(f"pattern {pattern!r} matches no weight.")
    prices = plan.optimality.prices if plan.optimality else ()
    active = None if plan.active_bytes is None else 0
    groups = groups_of(inventory, profile, Limits(0, active), constraints)
    tiers = {choice.name: choice.tier for choice in plan.choices}
    pairs = [_steps(group, tiers[group.weights[0].name], prices) for group in groups]
    of = {w.name: pair for group, pair in zip(groups, pairs, strict=True) for w in group.weights}
    ups = [up for up, _ in pairs if up is not None]
    downs = [down for _, down in pairs if down is not None]
    return Explanation(
        prices=prices,
        weights=tuple((c, *of[c.name]) for c in chosen),
        up=tuple(sorted(ups, key=lambda step: (-step.worth, step.weights))[:_NEXT]),
        down=tuple(sorted(downs, key=lambda step: (step.worth, step.weights))[:_NEXT]),
    )


def diff(before: Plan, after: Plan) -> list[Difference]:
    """The weights that two plans of one checkpoint store differently. Raises PlanError."""
    old = {choice.name: choice for choice in before.choices}
    if old.keys() != {choice.name for choice in after.choices}:
        raise PlanError(
            f"these plans hold other weights: one is for {before.source.name}, the other for "
            f"{after.source.name}."
        )
    found = []
    for new in after.choices:
        was = old[new.name]
        if was.tier != new.tier:
            known = was.kl is not None and new.kl is not None
            kl = (new.kl or 0) - (was.kl or 0) if known else None
            found.append(Difference(new.name, was.tier, new.tier, new.bytes - was.bytes, kl))
    return found


def explanation_json(found: Explanation) -> dict[str, Any]:
    """As `--json` prints it."""
    return {
        "prices": list(found.prices),
        "weights": [
            {
                "name": choice.name,
                "tier": choice.tier,
                "bytes": choice.bytes,
                "kl": choice.kl,
                "up": _json(up),
                "down": _json(down),
            }
            for choice, up, down in found.weights
        ],
        "up": [_json(step) for step in found.up],
        "down": [_json(step) for step in found.down],
    }


def _json(step: Step | None) -> dict[str, Any] | None:
    return None if step is None else {**asdict(step), "worth": step.worth}


def _steps(group: Group, tier: str, prices: tuple[float, ...]) -> tuple[Step | None, Step | None]:
    """(the step up that is worth the most, the step down that loses the least)"""
    if tier not in group.tiers:
        return None, None
    now = group.options[group.tiers.index(tier)]
    steps = []
    for to, option in zip(group.tiers, group.options, strict=True):
        costs = [a - b for a, b in zip(option.costs, now.costs, strict=True)]
        price = sum(p * c for p, c in zip(prices, costs, strict=False))
        names = tuple(weight.name for weight in group.weights)
        read = costs[1] if len(costs) > 1 else 0
        steps.append(Step(names, tier, to, costs[0], read, now.loss - option.loss, price))
    ups = [step for step in steps if step.bytes > 0 and step.saves > 0]
    downs = [step for step in steps if step.bytes < 0]
    return (
        max(ups, key=lambda step: step.worth, default=None),
        min(downs, key=lambda step: step.worth, default=None),
    )
