"""The allocator: from a sensitivity profile and a budget to the plan of least predicted KL."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.plan import Optimality, Plan
from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.errors import PlanError
from quantkit.formats.tiers import parse_tier
from quantkit.planning.budget import Budget
from quantkit.planning.constraints import Constraints, Group, groups_of
from quantkit.planning.knapsack import ImpossibleError, Solution, UnsolvedError, solve
from quantkit.planning.plan import make_plan, unquantized_assignment, with_predictions
from quantkit.units import bits_per_weight, size

_FACTOR = 10.0  # the most by which a measurement corrects the predictions of a role


def plan_by_budget(
    inventory: Inventory, profile: SensitivityProfile, budget: Budget, constraints: Constraints
) -> Plan:
    """Return the plan of least predicted KL within `budget`. Raises PlanError if no plan is."""
    profile = profile.quantized_by(constraints.quantizer)
    groups = groups_of(inventory, profile, budget, constraints)
    if budget.bytes is None:
        groups = [_lossless(group) for group in groups]
    solution = _solve(inventory, groups, budget, profile.is_measured)
    tiers = {
        weight.name: parse_tier(group.tiers[number])
        for group, number in zip(groups, solution.chosen, strict=True)
        for weight in group.weights
    }
    plan = make_plan(inventory, tiers, f"budget {budget.label}")
    plan = replace(plan, quantizer=constraints.quantizer)
    assert budget.bytes is None or plan.total_bytes <= budget.bytes, "more bytes than allowed"
    return replace(
        with_predictions(plan, profile),
        optimality=Optimality(budget.limits, solution.bound, solution.gap, solution.prices),
        calibration_texts=(profile.calibration,),
        memory_target=budget.memory_target,
    )


def _solve(
    inventory: Inventory, groups: Sequence[Group], budget: Budget, measured: bool
) -> Solution:
    """Return the choice of an option for every group. Raises PlanError if no plan is."""
    unquantized = unquantized_assignment(inventory)
    stored = sum(max(o.costs[0] for o in group.options) for group in groups)
    if budget.bytes is not None:
        stored = budget.bytes - unquantized.bytes
    left = [stored]
    if budget.active_bytes is not None:
        left.append(budget.active_bytes - (unquantized.active_bytes or 0))
    try:
        return solve([group.options for group in groups], left)
    except ImpossibleError as exc:
        for k, (need, limit) in enumerate(zip(exc.least, left, strict=True)):
            if need > limit:
                raise PlanError(_too_small(inventory, groups, budget, k, measured)) from exc
        both = " and ".join(budget.limits)
        raise PlanError(
            f"{both} are not possible: each limit alone is, but no plan is within both."
        ) from exc
    except UnsolvedError as exc:
        raise PlanError(f"{' and '.join(budget.limits)}: {exc}. Loosen a limit.") from exc


def _too_small(
    inventory: Inventory, groups: Sequence[Group], budget: Budget, limit: int, measured: bool
) -> str:
    """Return an error message with the least value of a limit, and its predicted KL."""
    unquantized = unquantized_assignment(inventory)
    fixed = (unquantized.bytes, unquantized.active_bytes or 0)[limit]
    smallest = [min((o.costs[limit], o.kl) for o in group.options) for group in groups]
    total = fixed + sum(cost for cost, _ in smallest)
    kl = sum(kl for _, kl in smallest)
    predicted = f", at a predicted KL divergence of {kl:.3g}" if measured else ""
    bits = f", {bits_per_weight(total, inventory.parameters):.3f}bpw" if limit == 0 else ""
    return (
        f"{budget.limits[limit]} are not possible: the allowed tiers take at least {total:,} bytes "
        f"({size(total)}{bits}){predicted}."
    )


def _lossless(group: Group) -> Group:
    """Return the group with only its smallest option of zero KL. Raises PlanError."""
    free = [i for i, option in enumerate(group.options) if option.kl == 0]
    if not free:
        raise PlanError(f"{group.weights[0].name}: no allowed tier is lossless.")
    best = min(free, key=lambda i: group.options[i].costs)
    return Group(group.weights, (group.tiers[best],), (group.options[best],))


def corrected_by(
    profile: SensitivityProfile, plan: Plan, measured: Mapping[str, float]
) -> SensitivityProfile:
    """Scale the KL costs of each role so that its prediction for `plan` equals the measurement.

    `measured` maps roles to the KL divergence of `plan` with only that role quantized, by the
    quantizer of the profile. No factor exceeds ten.
    """
    by_tier = {weight.name: weight.by_tier for weight in profile.weights}
    predicted: dict[str, float] = {}
    for assignment in plan.assignments:
        kl = by_tier[assignment.name][assignment.tier].kl
        predicted[assignment.role] = predicted.get(assignment.role, 0.0) + kl
    factors = {
        role: min(max(kl / predicted[role], 1 / _FACTOR), _FACTOR)
        for role, kl in measured.items()
        if predicted[role] > 0
    }
    weights = []
    for weight in profile.weights:
        factor = factors.get(weight.role, 1.0)
        costs = tuple(replace(cost, kl=cost.kl * factor) for cost in weight.costs)
        weights.append(replace(weight, costs=costs))
    return replace(profile, weights=tuple(weights))
