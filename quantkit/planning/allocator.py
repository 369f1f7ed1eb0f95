"""The allocator: from a sensitivity profile and a budget to the plan of least KL costs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt

from quantkit.artifacts.experts import Pruning, expert_blocks, first_experts, pruned_inventory
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
    """Return the plan within `budget` whose sum of KL costs is least. Raises PlanError if no plan
    is.

    Every number of experts to keep is solved for itself, and the best plan is returned.
    """
    profile = profile.quantized_by(constraints.quantizer)
    counts = constraints.expert_counts
    if not counts:
        return _plan(inventory, profile, budget, constraints, None)
    if budget.bytes is None:
        counts = tuple(count for count in counts if count == inventory.experts)
        if not counts:
            raise PlanError(f"budget {budget.label}: to remove experts is never lossless.")
    plans, refused = [], []
    for count in sorted(counts, reverse=True):
        pruning = _pruning(inventory, profile, count)
        try:
            plans.append(_plan(inventory, profile, budget, constraints, pruning))
        except PlanError as exc:
            refused.append(exc)
    if not plans:
        raise refused[-1]  # that of the fewest experts
    best = min(plans, key=lambda plan: (plan.sum_of_costs or 0.0, -plan.kept_parameters))
    bounds = [plan.optimality.bound for plan in plans if plan.optimality is not None]
    assert best.optimality is not None
    kl, bound = best.sum_of_costs or 0.0, min(bounds)
    gap = (kl - bound) / kl if kl > bound else 0.0
    solved = tuple(sorted(counts, reverse=True))
    optimality = replace(best.optimality, bound=bound, gap=gap, expert_counts=solved)
    return replace(best, optimality=optimality)


def _pruning(inventory: Inventory, profile: SensitivityProfile, count: int) -> Pruning | None:
    """Return the best experts of every block by the profile, None for all. Raises PlanError."""
    experts, rankings = inventory.experts or 0, profile.expert_rankings
    if count == experts:
        return None
    if not profile.is_measured:
        kept = first_experts(inventory, count)
        return Pruning(experts, kept, inventory.parameters, 0.0)
    blocks = expert_blocks(inventory)
    if not all(block in rankings and count in rankings[block].kl for block in blocks):
        raise PlanError(
            f"the profile lacks the cost of keeping {count} of {experts} experts. Measure it with: "
            f"quantkit profile SRC -o PROFILE --experts {count}"
        )
    kept = {block: rankings[block].kept(count) for block in blocks}
    kl = sum(rankings[block].kl[count] for block in blocks)
    return Pruning(experts, kept, inventory.parameters, kl)


def _plan(
    inventory: Inventory,
    profile: SensitivityProfile,
    budget: Budget,
    constraints: Constraints,
    pruning: Pruning | None,
) -> Plan:
    """Return the best plan that keeps the experts of `pruning`."""
    kept = inventory if pruning is None else pruned_inventory(inventory, pruning.kept)
    groups = groups_of(kept, profile, budget, constraints)
    if budget.bytes is None:
        groups = [_lossless(group) for group in groups]
    solution = _solve(kept, groups, budget, profile.is_measured)
    tiers = {
        weight.name: parse_tier(group.tiers[number])
        for group, number in zip(groups, solution.chosen, strict=True)
        for weight in group.weights
    }
    plan = make_plan(inventory, tiers, f"budget {budget.label}", pruning)
    plan = replace(plan, quantizer=constraints.quantizer)
    assert budget.bytes is None or plan.total_bytes <= budget.bytes, "more bytes than allowed"
    bound = solution.bound + (pruning.kl or 0.0 if pruning else 0.0)
    return replace(
        with_predictions(plan, profile),
        pruning=pruning,
        optimality=Optimality(budget.limits, bound, solution.gap, solution.prices),
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
    profile: SensitivityProfile,
    plan: Plan,
    measured: Mapping[str, float],
    removal: float | None = None,
) -> SensitivityProfile:
    """Scale the KL costs of each role so that its prediction for `plan` equals the measurement.

    `measured` maps roles to the KL divergence of `plan` with only that role quantized, by the
    quantizer of the profile; `removal` is that of removing its experts alone, which scales the
    costs of all numbers of experts. No factor exceeds ten.
    """
    by_tier = {weight.name: weight.by_tier for weight in profile.weights}
    predicted: dict[str, dict[str, float]] = {}
    for a in plan.assignments:
        predicted.setdefault(a.role, {})[a.name] = by_tier[a.name][a.tier].kl
    factors = {
        role: _correction(kl, sum(costs.values()), profile.expert_shift(costs))
        for role, kl in measured.items()
        for costs in (predicted[role],)
    }
    weights = []
    for weight in profile.weights:
        factor = factors.get(weight.role, 1.0)
        costs = tuple(replace(cost, kl=cost.kl * factor) for cost in weight.costs)
        weights.append(replace(weight, costs=costs))
    profile = replace(profile, weights=tuple(weights))
    if removal is None or plan.pruning is None:
        return profile
    factor = _correction(removal, profile.removal_costs[plan.pruning.count])
    rankings = {
        block: replace(ranking, kl={count: kl * factor for count, kl in ranking.kl.items()})
        for block, ranking in profile.expert_rankings.items()
    }
    return replace(profile, expert_rankings=rankings)


def _correction(measured: float, costs: float, expert_shift: float = 0.0) -> float:
    """Return the factor f that makes a prediction equal the measurement, within limits.

    It scales costs, and expert-shift by its root: f costs + sqrt(f) expert_shift = measured.
    """
    if costs <= 0:
        return 1.0
    measured = max(0.0, measured)
    root = (sqrt(expert_shift**2 + 4 * costs * measured) - expert_shift) / (2 * costs)
    return min(max(root**2, 1 / _FACTOR), _FACTOR)
