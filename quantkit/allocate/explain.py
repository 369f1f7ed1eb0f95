"""Why a plan is as it is, what would change next, and how two plans differ."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.allocate.allocate import Wishes, allowed_losses, matches
from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.plan import Choice, Plan
from quantkit.artifacts.profile import Loss, Profile
from quantkit.errors import InputError, PlanError

_NEXT = 8  # steps told of that come next


@dataclass(frozen=True)
class Step:
    """One weight moved to another tier: the bytes it takes more and the loss it saves (both
    negative for fewer bytes), and the second over the first."""

    weight: str
    tier: str
    to: str
    bytes: int
    saves: float

    @property
    def rate(self) -> float:
        """Nats per token saved for every byte."""
        return self.saves / self.bytes if self.bytes else float("inf")


@dataclass(frozen=True)
class Explanation:
    """`price` is what a byte is worth at the optimum (nats per token and byte; None where no budget
    was solved for). `weights` are (choice, the best step up, the best step down), None where there
    is none; `up` and `down` the steps that come next with more or less budget.
    """

    price: float | None
    weights: tuple[tuple[Choice, Step | None, Step | None], ...]
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
    plan: Plan, inventory: Inventory, profile: Profile, wishes: Wishes, pattern: str = "*"
) -> Explanation:
    """Why the weights that match `pattern` have their tiers. Raises InputError for none.

    A step up is worth its bytes if it saves more per byte than the price, a step down if it loses
    less. Only tiers that `wishes` allow are looked at.
    """
    chosen = [c for c in plan.choices if matches(pattern, c.name, c.role)]
    if not chosen:
        raise InputError(f"pattern {pattern!r} matches no weight.")
    losses = allowed_losses(inventory, profile, wishes)
    steps = {c.name: _steps(c, losses[c.name]) for c in plan.choices}
    ups = [up for up, _ in steps.values() if up is not None]
    downs = [down for _, down in steps.values() if down is not None]
    return Explanation(
        price=plan.proof.prices[0] if plan.proof else None,
        weights=tuple((c, *steps[c.name]) for c in chosen),
        up=tuple(sorted(ups, key=lambda step: (-step.rate, step.weight))[:_NEXT]),
        down=tuple(sorted(downs, key=lambda step: (step.rate, step.weight))[:_NEXT]),
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
        "price": found.price,
        "weights": [
            {
                "name": c.name,
                "tier": c.tier,
                "bytes": c.bytes,
                "kl": c.kl,
                "up": _json(up),
                "down": _json(down),
            }
            for c, up, down in found.weights
        ],
        "up": [_json(step) for step in found.up],
        "down": [_json(step) for step in found.down],
    }


def _json(step: Step | None) -> dict[str, Any] | None:
    if step is None:
        return None
    return {**asdict(step), "rate": step.rate}


def _steps(choice: Choice, losses: Mapping[str, Loss]) -> tuple[Step | None, Step | None]:
    """(the step up that saves the most per byte, the step down that loses the least)"""
    if choice.tier not in losses:
        return None, None
    now = losses[choice.tier]
    steps = [
        Step(choice.name, choice.tier, other.tier, other.bytes - now.bytes, now.kl - other.kl)
        for other in losses.values()
        if other.tier != choice.tier
    ]
    ups = [step for step in steps if step.bytes > 0 and step.saves > 0]
    downs = [step for step in steps if step.bytes < 0]
    up = max(ups, key=lambda step: step.rate, default=None)
    down = min(downs, key=lambda step: step.rate, default=None)
    return up, down
