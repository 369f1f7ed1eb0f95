"""The frontier: the best plans by budget, and the shipped recipes beside them."""

from contextlib import suppress
from dataclasses import replace

from quantkit.artifacts.experts import first_experts, pruned_inventory
from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.errors import InputError, PlanError
from quantkit.planning.allocator import plan_by_budget
from quantkit.planning.budget import Budget
from quantkit.planning.constraints import Constraints, allowed_tiers, groups_of
from quantkit.planning.plan import unquantized_assignment, with_predictions
from quantkit.planning.recipe import load_recipe, plan_by_recipe, recipe_names
from quantkit.quantizers.registry import RTN
from quantkit.units import bits_per_weight

_USED = 0.99  # of the bytes of a budget, from which on a recipe has the same size


def frontier(
    inventory: Inventory,
    profile: SensitivityProfile,
    constraints: Constraints,
    active_bytes: int | None = None,
    points: int = 24,
) -> list[Plan]:
    """Return the best plans at evenly spaced budgets.

    The budgets range from the smallest possible size to the smallest size of least KL; each plan
    reads at most `active_bytes` per token. Raises PlanError.
    """
    everything = Budget(inventory.total_bytes, "native", active_bytes)
    largest = plan_by_budget(inventory, profile, everything, constraints)
    lossless = largest.predicted_kl == 0 and constraints.may_keep(inventory.experts)
    if lossless and active_bytes is None:
        largest = plan_by_budget(inventory, profile, Budget(None, "lossless"), constraints)
    fewest = inventory
    if constraints.expert_counts:
        kept = first_experts(inventory, min(constraints.expert_counts))
        fewest = pruned_inventory(inventory, kept)
    groups = groups_of(fewest, profile, Budget(0), constraints)
    least = sum(min(o.costs[0] for o in g.options) for g in groups)
    least += unquantized_assignment(fewest).bytes
    plans: list[Plan] = []
    for step in range(points - 1):
        limit = least + (largest.total_bytes - least) * step // (points - 1)
        label = f"{bits_per_weight(limit, inventory.parameters):.3f}bpw"
        try:
            budget = Budget(limit, label, active_bytes)
            plan = plan_by_budget(inventory, profile, budget, constraints)
        except PlanError:  # the smallest possible plan may read too much
            continue
        if not plans or plan.total_bytes != plans[-1].total_bytes:
            plans.append(plan)
    return [*plans, largest]


def recipe_baselines(
    inventory: Inventory, profile: SensitivityProfile, budget: Budget, constraints: Constraints
) -> list[Plan]:
    """Return the plans of shipped recipes that fit the budget and use up its bytes.

    `constraints` hold for them, save that their routers may be quantized; so does their quantizer,
    which rounds floating-point tiers to nearest. Recipes keep all experts.
    """
    baselines: list[Plan] = []
    if not constraints.may_keep(inventory.experts):
        return baselines
    loose = replace(constraints, routers=True, quantizer=RTN)
    allowed = allowed_tiers(inventory, profile, loose)
    for plan in recipe_plans(inventory, profile):
        if budget.bytes is None or not budget.bytes * _USED <= plan.total_bytes <= budget.bytes:
            continue
        if budget.active_bytes is not None and (plan.active_bytes or 0) > budget.active_bytes:
            continue
        if not constraints.ties and all(a.tier in allowed[a.name] for a in plan.assignments):
            plan = replace(
                plan, quantizer=constraints.quantizer, memory_target=budget.memory_target
            )
            baselines.append(with_predictions(plan, profile))
    return baselines


def recipe_plans(inventory: Inventory, profile: SensitivityProfile) -> list[Plan]:
    """Return the plans of the shipped recipes that cover a checkpoint, with predicted KL costs."""
    plans = []
    for name in recipe_names():
        with suppress(InputError):  # a recipe for other models
            plan = plan_by_recipe(inventory, load_recipe(name))
            plans.append(with_predictions(plan, profile))
    return plans
