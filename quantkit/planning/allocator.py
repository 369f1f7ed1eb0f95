"""From a profile and limits to the plan that loses least, proven."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from quantkit.artifacts.inventory import Inventory, Weight
from quantkit.artifacts.plan import Optimality, Plan
from quantkit.artifacts.profile import SensitivityProfile, TierCost
from quantkit.artifacts.roles import ROLE_GROUPS, ROLES
from quantkit.errors import InputError, PlanError
from quantkit.formats.tiers import NATIVE, Tier, canonical, kept_name, parse_tier
from quantkit.planning.knapsack import ImpossibleError, UnsolvedError, solve
from quantkit.planning.options import Option
from quantkit.planning.plan import (
    active_bytes,
    make_plan,
    stored_bytes,
    unquantized_assignment,
    with_predictions,
)
from quantkit.planning.recipe import load_recipe, plan_by_recipe, recipe_names
from quantkit.units import bits_per_weight, size


@dataclass(frozen=True)
class Constraints:
    """What a plan must keep to, beside its budget.

    `pins` are (pattern, tier), the first that matches decides; `tiers` those that may be chosen
    beside what the source holds; weights of one layer that match a pattern of `ties` share a tier;
    routers stay as they are unless `routers`, or a pin, says otherwise. A pattern is a role, a
    group of roles, or a shell pattern on the end of the module path (`experts.*`). With a
    `rounding` other than to nearest (rtn), tiers are those that it knows: affine ones, save for
    embeddings.
    """

    pins: tuple[tuple[str, Tier], ...] = ()
    tiers: tuple[Tier, ...] | None = None
    min_tier: Tier | None = None
    ties: tuple[str, ...] = ()
    routers: bool = False
    rounding: str = "rtn"


@dataclass(frozen=True)
class Limits:
    """At most so many bytes stored (None: no loss at all), and read per generated token.

    `about` says the first in the words of whoever asked.
    """

    bytes: int | None
    active: int | None = None
    about: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        stored = (
            self.about if self.bytes is None else f"{self.about or 'budget'}: {self.bytes:,} bytes"
        )
        read = () if self.active is None else (f"{self.active:,} bytes read per token",)
        return (stored, *read)


@dataclass(frozen=True)
class Group:
    """Weights that share a tier, and what each tier costs and loses for all of them together.

    The costs are bytes stored, and bytes read per token where they are limited.
    """

    weights: tuple[Weight, ...]
    tiers: tuple[str, ...]
    options: tuple[Option, ...]


def plan_by_budget(
    inventory: Inventory, profile: SensitivityProfile, limits: Limits, constraints: Constraints
) -> Plan:
    """The plan of least predicted loss within `limits`. Raises PlanError when there is none."""
    groups = groups_of(inventory, profile, limits, constraints)
    kept = unquantized_assignment(inventory)
    if limits.bytes is None:
        groups = [_lossless(group) for group in groups]
    total = sum(max(o.costs[0] for o in group.options) for group in groups)
    stored = total if limits.bytes is None else limits.bytes - kept.bytes
    left = [stored] if limits.active is None else [stored, limits.active - (kept.active_bytes or 0)]
    try:
        solution = solve([group.options for group in groups], left)
    except ImpossibleError as exc:
        raise PlanError(
            _impossible(inventory, groups, limits, exc.least, left, profile.is_measured)
        ) from exc
    except UnsolvedError as exc:
        raise PlanError(f"{' and '.join(limits.texts)}: {exc}. Loosen one of them.") from exc
    tiers = {
        weight.name: parse_tier(group.tiers[number])
        for group, number in zip(groups, solution.chosen, strict=True)
        for weight in group.weights
    }
    plan = make_plan(inventory, tiers, f"budget {limits.about}")
    assert limits.bytes is None or plan.total_bytes <= limits.bytes, "more bytes than allowed"
    return replace(
        with_predictions(plan, profile),
        optimality=Optimality(limits.texts, solution.bound, solution.gap, solution.prices),
        calibration_texts=(profile.calibration,),
        rounding=constraints.rounding,
    )


def frontier(
    inventory: Inventory,
    profile: SensitivityProfile,
    constraints: Constraints,
    active: int | None = None,
    points: int = 24,
) -> list[Plan]:
    """The best plans at budgets spread evenly from the smallest possible to the smallest of least
    loss, each reading no more than `active` bytes per token.

    Raises PlanError.
    """
    everything = Limits(inventory.total_bytes, active, "native")
    largest = plan_by_budget(inventory, profile, everything, constraints)
    if largest.predicted_kl == 0 and active is None:
        largest = plan_by_budget(inventory, profile, Limits(None, about="lossless"), constraints)
    groups = groups_of(inventory, profile, Limits(0), constraints)
    least = sum(min(o.costs[0] for o in g.options) for g in groups) + largest.kept.bytes
    plans: list[Plan] = []
    for step in range(points - 1):
        limit = least + (largest.total_bytes - least) * step // (points - 1)
        about = f"{bits_per_weight(limit, inventory.parameters):.3f}bpw"
        try:
            plan = plan_by_budget(inventory, profile, Limits(limit, active, about), constraints)
        except PlanError:  # the smallest that can be stored may read too much
            continue
        if not plans or plan.total_bytes != plans[-1].total_bytes:
            plans.append(plan)
    return [*plans, largest]


def recipe_baselines(
    inventory: Inventory, profile: SensitivityProfile, limits: Limits, constraints: Constraints
) -> list[Plan]:
    """The shipped recipes' plans that `limits` and `constraints` allow and that use up the bytes; their
    routers may be what they say."""
    found = []
    allowed = allowed_tiers(inventory, profile, replace(constraints, routers=True, rounding="rtn"))
    for plan in recipe_plans(inventory, profile):
        if limits.bytes is None or not limits.bytes * 0.99 <= plan.total_bytes <= limits.bytes:
            continue
        if limits.active is not None and (plan.active_bytes or 0) > limits.active:
            continue
        if not constraints.ties and all(c.tier in allowed[c.name] for c in plan.choices):
            found.append(plan)
    return found


def recipe_plans(inventory: Inventory, profile: SensitivityProfile) -> list[Plan]:
    """The plans of the shipped recipes that suit a checkpoint, with their predicted losses."""
    found = []
    for name in recipe_names():
        with suppress(InputError):  # not made for this model
            plan = plan_by_recipe(inventory, load_recipe(name))
            found.append(with_predictions(plan, profile))
    return found


def corrected_by(
    profile: SensitivityProfile, plan: Plan, measured: Mapping[str, float]
) -> SensitivityProfile:
    """`profile` with the losses of each role scaled so that `plan`, of that role alone, would be
    predicted what was measured; by ten at most."""
    predicted: dict[str, float] = {}
    for choice in plan.choices:
        predicted[choice.role] = predicted.get(choice.role, 0.0) + (choice.kl or 0.0)
    factors = {
        role: min(max(kl / predicted[role], 0.1), 10.0)
        for role, kl in measured.items()
        if predicted[role] > 0
    }
    weights = []
    for weight in profile.weights:
        factor = factors.get(weight.role, 1.0)
        losses = tuple(replace(loss, kl=loss.kl * factor) for loss in weight.losses)
        weights.append(replace(weight, losses=losses))
    return replace(profile, weights=tuple(weights))


def matches(pattern: str, name: str, role: str) -> bool:
    """Whether `pattern` (a role, a group of roles, or a shell pattern) means the weight `name`."""
    if pattern in ROLES or pattern in ROLE_GROUPS:
        return role in ROLE_GROUPS.get(pattern, (pattern,))
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def parse_pins(texts: Iterable[str]) -> tuple[tuple[str, Tier], ...]:
    """`PATTERN=TIER` each. Raises InputError."""
    pins = []
    for text in texts:
        pattern, equals, tier = text.rpartition("=")
        if not equals or not pattern:
            raise InputError(
                f"--pin {text!r}: write it like 'lm_head=q6g64' or 'experts.*=native'."
            )
        pins.append((pattern, parse_tier(tier)))
    return tuple(pins)


def groups_of(
    inventory: Inventory, profile: SensitivityProfile, limits: Limits, constraints: Constraints
) -> list[Group]:
    """What there is to choose from. Raises PlanError or InputError for wishes that cannot be."""
    losses = allowed_tiers(inventory, profile, constraints)
    for pattern in (*(pattern for pattern, _ in constraints.pins), *constraints.ties):
        if not any(matches(pattern, w.name, w.role) for w in inventory.weights):
            raise InputError(f"pattern {pattern!r} matches no weight.")
    groups: dict[object, list[Weight]] = {}
    for weight in inventory.weights:
        tie = next((t for t in constraints.ties if matches(t, weight.name, weight.role)), None)
        key = weight.name if tie is None else (tie, weight.layer)
        groups.setdefault(key, []).append(weight)
    return [_group(inventory, weights, losses, limits) for weights in groups.values()]


def allowed_tiers(
    inventory: Inventory, profile: SensitivityProfile, constraints: Constraints
) -> dict[str, dict[str, TierCost]]:
    """Weight -> tier -> loss, of the tiers that `constraints` allow, largest first. Raises PlanError for
    a profile that lacks a weight, or a pin's tier."""
    known = {weight.name: weight.by_tier for weight in profile.weights}
    if lacking := {weight.name for weight in inventory.weights} - known.keys():
        raise PlanError(f"the profile lacks {min(lacking)}. Make it anew.")
    for tier in (
        *(constraints.tiers or ()),
        *((constraints.min_tier,) if constraints.min_tier else ()),
    ):
        if tier == NATIVE:
            raise InputError("tier native may always be chosen, and names no size. Name another.")
    for tier in constraints.tiers or ():
        if tier.quantized and tier.name not in profile.tiers:
            held = ", ".join(profile.tiers)
            raise InputError(f"tier {tier} is not in the profile, which holds {held}.")
    found = {}
    for weight in inventory.weights:
        losses = known[weight.name]
        if kept_name(weight.storage) not in losses:
            raise PlanError(f"the profile lacks {weight.name} as it is held. Make it anew.")
        found[weight.name] = {tier: losses[tier] for tier in _allowed(weight, losses, constraints)}
    return found


def _group(
    inventory: Inventory,
    weights: Sequence[Weight],
    losses: Mapping[str, Mapping[str, TierCost]],
    limits: Limits,
) -> Group:
    first, *rest = (losses[weight.name] for weight in weights)
    shared = [tier for tier in first if all(tier in one for one in rest)]
    if not shared:
        raise PlanError(f"{weights[0].name}: no tier is left that all weights tied to it may have.")
    options = []
    for tier in shared:
        stored = [stored_bytes(weight, parse_tier(tier)) for weight in weights]
        costs = [sum(stored)]
        if limits.active is not None:
            read = (_read(inventory, w, size) for w, size in zip(weights, stored, strict=True))
            costs.append(sum(read))
        options.append(Option(tuple(costs), sum(losses[w.name][tier].kl for w in weights)))
    return Group(tuple(weights), tuple(shared), tuple(options))


def _read(inventory: Inventory, weight: Weight, stored: int) -> int:
    read = active_bytes(inventory, weight, stored)
    if read is None:
        raise InputError(
            "config.json does not say how many experts a token uses, so what is read per token is "
            "not known. Leave --active-bytes and --speed out."
        )
    return read


def _allowed(weight: Weight, losses: Mapping[str, TierCost], constraints: Constraints) -> list[str]:
    """The tiers that a weight may have, in the profile's order."""
    storage, native = parse_tier(weight.storage), kept_name(weight.storage)
    for pattern, tier in constraints.pins:
        if matches(pattern, weight.name, weight.role):
            name = canonical(tier, storage).name
            if name not in losses:
                raise PlanError(
                    f"{weight.name}: pinned to {tier}, of which the profile knows no loss. Profile "
                    f"with --tiers {tier} (tiers larger than {native} can only lose)."
                )
            return [name]
    if weight.role == "router" and not constraints.routers:
        return [native]
    return [tier for tier in losses if tier == native or _wanted(tier, weight, constraints)]


def _wanted(name: str, weight: Weight, constraints: Constraints) -> bool:
    tier = parse_tier(name)
    calibrated = constraints.rounding != "rtn" and weight.role != "embedding"
    if calibrated and tier.mode != "affine":
        return False
    if constraints.tiers is not None and tier not in constraints.tiers:
        return False
    least = constraints.min_tier
    shape = (1, 1 << 12)  # bits per weight, whatever fits
    return least is None or tier.stored_bytes(shape) >= least.stored_bytes(shape)


def _lossless(group: Group) -> Group:
    """The smallest of the options that lose nothing."""
    free = [i for i, option in enumerate(group.options) if option.loss == 0]
    if not free:
        raise PlanError(
            f"{group.weights[0].name}: is to lose nothing, but no tier that it may have does that."
        )
    best = min(free, key=lambda i: group.options[i].costs)
    return Group(group.weights, (group.tiers[best],), (group.options[best],))


def _impossible(
    inventory: Inventory,
    groups: Sequence[Group],
    limits: Limits,
    least: Sequence[int],
    left: Sequence[int],
    measured: bool,
) -> str:
    kept = unquantized_assignment(inventory)
    fixed = (kept.bytes, kept.active_bytes or 0)
    for k, (need, limit) in enumerate(zip(least, left, strict=True)):
        if need > limit:
            losses = [min((o.costs[k], o.loss) for o in group.options)[1] for group in groups]
            at = f", at a predicted KL divergence of {sum(losses):.3g}" if measured else ""
            total = need + fixed[k]
            bits = f", {bits_per_weight(total, inventory.parameters):.3f}bpw" if k == 0 else ""
            return (
                f"{limits.texts[k]} are not possible: the tiers that are allowed take at least "
                f"{total:,} bytes ({size(total)}{bits}){at}."
            )
    both = " and ".join(limits.texts)
    return f"{both} are not possible: each alone is, but no plan keeps to both."
