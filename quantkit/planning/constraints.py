"""The constraints of a plan beside its budget, and the tiers that they allow."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from quantkit.artifacts.inventory import Inventory, Weight
from quantkit.artifacts.roles import ROLE_GROUPS, ROLES
from quantkit.artifacts.sensitivity import SensitivityProfile, TierCost
from quantkit.errors import InputError, PlanError, in_field
from quantkit.formats.tiers import NATIVE, Tier, canonical, is_available, native_name, parse_tier
from quantkit.planning.budget import Budget
from quantkit.planning.knapsack_items import Option
from quantkit.planning.plan import active_bytes, stored_bytes
from quantkit.quantizers.registry import RTN, find_quantizer

_SHAPE = (1, 1 << 12)  # divisible by every group size, to compare bits per weight


@dataclass(frozen=True)
class Constraints:
    """The constraints of a plan beside its budget.

    `pins` are (pattern, tier): the first matching pattern decides. `tiers` are the tiers to choose
    from, in addition to the native one. `ties` are patterns: matching weights of a layer share a
    tier. Routers keep their native tier unless `routers` is set or a pin matches. A pattern is a
    role, a group of roles, or a shell pattern on the end of the module path (`experts.*`). A
    calibrated `quantizer` allows affine tiers only, save for embeddings. A plan keeps one of
    `expert_counts` experts in every block; without numbers, all.
    """

    pins: tuple[tuple[str, Tier], ...] = ()
    tiers: tuple[Tier, ...] | None = None
    min_tier: Tier | None = None
    ties: tuple[str, ...] = ()
    routers: bool = False
    quantizer: str = RTN
    expert_counts: tuple[int, ...] = ()

    def may_keep(self, experts: int | None) -> bool:
        """Return whether a plan may keep so many experts, if the checkpoint has no more."""
        return not self.expert_counts or experts in self.expert_counts


@dataclass(frozen=True)
class Group:
    """Weights that share a tier, and the options for all of them together.

    The costs of an option are its stored bytes, and its bytes read per token if they are limited.
    """

    weights: tuple[Weight, ...]
    tiers: tuple[str, ...]
    options: tuple[Option, ...]


def matches(pattern: str, name: str, role: str) -> bool:
    """Return whether `pattern` (a role, a group of roles, or a shell pattern) matches a weight."""
    if pattern in ROLES or pattern in ROLE_GROUPS:
        return role in ROLE_GROUPS.get(pattern, (pattern,))
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def parse_pins(texts: Iterable[str]) -> tuple[tuple[str, Tier], ...]:
    """Parse `PATTERN=TIER` texts. Raises InputError."""
    pins = []
    for text in texts:
        pattern, equals, tier = text.rpartition("=")
        if not equals or not pattern:
            raise InputError(
                f"`pins` {text!r}: write it like 'lm_head=q6g64' or 'experts.*=native'."
            )
        with in_field("pins"):
            pins.append((pattern, parse_tier(tier)))
    return tuple(pins)


def groups_of(
    inventory: Inventory, profile: SensitivityProfile, budget: Budget, constraints: Constraints
) -> list[Group]:
    """Return the groups of weights with their options. Raises PlanError or InputError."""
    tier_costs = allowed_tiers(inventory, profile, constraints)
    pins = [pattern for pattern, _ in constraints.pins]
    for field, patterns in (("pins", pins), ("ties", constraints.ties)):
        for pattern in patterns:
            if not any(matches(pattern, w.name, w.role) for w in inventory.weights):
                raise InputError(f"`{field}` pattern {pattern!r} matches no weight.")
    groups: dict[object, list[Weight]] = {}
    for weight in inventory.weights:
        tie = next((t for t in constraints.ties if matches(t, weight.name, weight.role)), None)
        key = weight.name if tie is None else (tie, weight.layer)
        groups.setdefault(key, []).append(weight)
    return [_group(inventory, weights, tier_costs, budget) for weights in groups.values()]


def allowed_tiers(
    inventory: Inventory, profile: SensitivityProfile, constraints: Constraints
) -> dict[str, dict[str, TierCost]]:
    """Return weight -> tier -> cost for the allowed tiers, largest tier first.

    Raises PlanError for a profile without a weight, or without the tier of a pin.
    """
    by_weight = {weight.name: weight.by_tier for weight in profile.weights}
    if lacking := {weight.name for weight in inventory.weights} - by_weight.keys():
        raise PlanError(f"the profile lacks {min(lacking)}. Make it again.")
    _check_tiers(profile, constraints)
    allowed = {}
    for weight in inventory.weights:
        costs = by_weight[weight.name]
        if native_name(weight.storage) not in costs:
            raise PlanError(f"the profile lacks {weight.name} in its native tier. Make it again.")
        allowed[weight.name] = {tier: costs[tier] for tier in _allowed(weight, costs, constraints)}
    return allowed


def _check_tiers(profile: SensitivityProfile, constraints: Constraints) -> None:
    find_quantizer(constraints.quantizer)
    least = (constraints.min_tier,) if constraints.min_tier else ()
    for tier in (*(constraints.tiers or ()), *least):
        if tier == NATIVE:
            raise InputError("tier native is always allowed, and has no size. Name another tier.")
    for tier in constraints.tiers or ():
        if tier.quantized and tier.name not in profile.tiers:
            names = ", ".join(profile.tiers)
            raise InputError(f"tier {tier} is not in the profile, which has {names}.")


def _group(
    inventory: Inventory,
    weights: Sequence[Weight],
    tier_costs: Mapping[str, Mapping[str, TierCost]],
    budget: Budget,
) -> Group:
    first, *others = (tier_costs[weight.name] for weight in weights)
    shared = [tier for tier in first if all(tier in other for other in others)]
    if not shared:
        raise PlanError(
            f"{weights[0].name}: the weights tied to it have no allowed tier in common."
        )
    options = []
    for tier in shared:
        stored = [stored_bytes(weight, parse_tier(tier)) for weight in weights]
        costs = [sum(stored)]
        if budget.active_bytes is not None:
            read = (_read(inventory, w, size) for w, size in zip(weights, stored, strict=True))
            costs.append(sum(read))
        options.append(Option(tuple(costs), sum(tier_costs[w.name][tier].kl for w in weights)))
    return Group(tuple(weights), tuple(shared), tuple(options))


def _read(inventory: Inventory, weight: Weight, stored: int) -> int:
    read = active_bytes(inventory, weight, stored)
    if read is None:
        raise InputError(
            "config.json does not say how many experts a token uses, so the bytes read per token "
            "are unknown. Leave out `active_bytes` and `speed`."
        )
    return read


def _allowed(weight: Weight, costs: Mapping[str, TierCost], constraints: Constraints) -> list[str]:
    """Return the allowed tiers of a weight, in the order of the profile."""
    storage, native = parse_tier(weight.storage), native_name(weight.storage)
    for pattern, tier in constraints.pins:
        if matches(pattern, weight.name, weight.role):
            name = canonical(tier, storage).name
            if name not in costs:
                raise PlanError(
                    f"{weight.name}: pinned to {tier}, whose KL cost is not in the profile. "
                    f"Profile with `tiers` {tier} (tiers larger than {native} are never better)."
                )
            return [name]
    if weight.role == "router" and not constraints.routers:
        return [native]
    return [tier for tier in costs if tier == native or _is_allowed(tier, weight, constraints)]


def _is_allowed(name: str, weight: Weight, constraints: Constraints) -> bool:
    tier = parse_tier(name)
    if not is_available(tier):
        return False
    calibrated = find_quantizer(constraints.quantizer).calibrated and weight.role != "embedding"
    if calibrated and tier.mode != "affine":
        return False
    if constraints.tiers is not None and tier not in constraints.tiers:
        return False
    least = constraints.min_tier
    return least is None or tier.stored_bytes(_SHAPE) >= least.stored_bytes(_SHAPE)
