"""Make plans, read them back, and count their bytes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantkit.artifacts.experts import Pruning, pruned_inventory, require_fitting
from quantkit.artifacts.inventory import Inventory, UnquantizedTensor, Weight
from quantkit.artifacts.plan import Assignment, Plan, read_pruning, tiers_sha256
from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.errors import PlanError, TierError, fault
from quantkit.formats.tiers import Tier, canonical, parse_tier, require_available, resolve
from quantkit.storage.json_files import require_kind
from quantkit.units import like_others

UNQUANTIZED = "unquantized"


def make_plan(
    inventory: Inventory, tiers: Mapping[str, Tier], origin: str, pruning: Pruning | None = None
) -> Plan:
    """Return the plan that stores each weight of a checkpoint in `tiers[name]`.

    `pruning` are the experts to keep, None for all. Raises TierError for a tier that does not fit,
    PlanError if `tiers` or `pruning` are for another inventory.
    """
    _require_same_weights(inventory, tiers)
    if pruning is not None:
        require_fitting(pruning, inventory, "plan")
        inventory = pruned_inventory(inventory, pruning.kept)
    assignments = tuple(_assignment(inventory, w, tiers[w.name]) for w in inventory.weights)
    return Plan(
        inventory.source,
        inventory.model_type,
        origin,
        assignments,
        unquantized_assignment(inventory),
        pruning=pruning,
    )


def with_predictions(plan: Plan, profile: SensitivityProfile) -> Plan:
    """Return `plan` with the KL costs of a profile for its quantizer, None for tiers that are not
    in it.

    The same holds for the experts that it removes. Optimality and measured KL are dropped, since
    they belong to other predictions.
    """
    profile = profile.quantized_by(plan.quantizer)
    costs = {w.name: {cost.tier: cost.kl for cost in w.costs} for w in profile.weights}
    assignments = tuple(replace(c, kl=costs[c.name].get(c.tier)) for c in plan.assignments)
    plan = replace(
        plan,
        assignments=assignments,
        kl_quantizer=profile.quantizer,
        optimality=None,
        measured_kl=None,
        pruning=_predicted(plan.pruning, profile),
    )
    complete = plan.sum_of_costs is not None
    kl = {a.name: a.kl for a in assignments if a.kl is not None}
    return replace(plan, expert_shift=profile.expert_shift(kl) if complete else 0.0)


def _predicted(pruning: Pruning | None, profile: SensitivityProfile) -> Pruning | None:
    """Return a pruning with the KL cost of a profile, None if it keeps other experts."""
    if pruning is None:
        return None
    rankings, count = profile.expert_rankings, pruning.count
    same = all(
        block in rankings and count in rankings[block].kl and rankings[block].kept(count) == numbers
        for block, numbers in pruning.kept.items()
    )
    kl = sum(rankings[block].kl[count] for block in pruning.kept) if same else None
    return replace(pruning, kl=kl)


def read_plan(data: Mapping[str, Any], inventory: Inventory, where: str) -> Plan:
    """Read the plan in a JSON file, and compute its bytes again.

    An edited plan keeps its names, tiers, quantizer and texts only. Raises PlanError for another
    checkpoint, TierError for its tiers.
    """
    require_kind(data, "plan", where)
    try:
        structure = data["source"]["structure"]
        origin, unquantized = str(data.get("origin", "plan")), data.get("unquantized", {})
        named = [(weight["name"], weight["tier"]) for weight in data["weights"]]
        tiers = {name: _parse_tier(where, name, tier) for name, tier in named}
        pruning = read_pruning(data)
        kept = None if pruning is None else pruning.kept
        edited = tiers_sha256(named, kept) != data["tiers_sha256"]
        if unquantized.get("tier", UNQUANTIZED) != UNQUANTIZED:
            raise PlanError(
                f"{where}: norms, biases and sinks are never quantized; no tier applies to them."
            )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise PlanError(f"{where}: not a complete plan ({fault(exc)}).") from exc
    if len(tiers) != len(data["weights"]):
        raise PlanError(f"{where}: names a weight twice.")
    if structure != inventory.source.structure:
        raise PlanError(
            f"{where}: made for another checkpoint ({data['source'].get('name')}), "
            f"not for {inventory.source.name}. Plan again."
        )
    if edited and not origin.startswith("edited"):
        origin = f"edited from {origin}"
    try:
        plan = make_plan(inventory, tiers, origin, _counted(pruning, inventory, edited))
    except PlanError as exc:
        raise PlanError(f"{where}: {exc}") from exc
    return _with_saved(plan, Plan.from_json(data, where), edited)


def _counted(pruning: Pruning | None, inventory: Inventory, edited: bool) -> Pruning | None:
    """Return a saved pruning over the parameters of `inventory`, without prediction if edited."""
    if pruning is None:
        return None
    kl = None if edited else pruning.kl
    return replace(pruning, source_parameters=inventory.parameters, kl=kl)


def unedited_plan(data: Mapping[str, Any], where: str) -> Plan:
    """Read a plan without its checkpoint. Raises PlanError if it was edited: its bytes are old."""
    plan = Plan.from_json(data, where)
    if plan.tiers_sha256 != data.get("tiers_sha256"):
        raise PlanError(
            f"{where}: was edited. Count its bytes again first: "
            f"quantkit plan SRC --plan {where} -o FILE"
        )
    return plan


def _with_saved(plan: Plan, saved: Plan, edited: bool) -> Plan:
    """Return `plan` with the decisions of the saved one, and its predictions unless edited."""
    plan = replace(
        plan,
        calibration_texts=saved.calibration_texts,
        quantizer=saved.quantizer,
        tuning_steps=saved.tuning_steps,
        memory_target=saved.memory_target,
    )
    if edited:
        return plan
    costs = {assignment.name: assignment.kl for assignment in saved.assignments}
    assignments = tuple(replace(a, kl=costs[a.name]) for a in plan.assignments)
    return replace(
        plan,
        assignments=assignments,
        expert_shift=saved.expert_shift,
        kl_quantizer=saved.kl_quantizer,
        optimality=saved.optimality,
        measured_kl=saved.measured_kl,
    )


def _parse_tier(where: str, weight: str, name: str) -> Tier:
    try:
        return parse_tier(name)
    except TierError as exc:
        raise TierError(f"{where}: {weight}: {exc}") from exc


def _assignment(inventory: Inventory, weight: Weight, tier: Tier) -> Assignment:
    storage = parse_tier(weight.storage)
    physical = resolve(tier, storage)
    require_available(physical)
    physical.require_fit(weight.name, weight.shape)
    stored = stored_bytes(weight, tier)
    return Assignment(
        name=weight.name,
        role=weight.role,
        layer=weight.layer,
        tier=canonical(tier, storage).name,
        storage=physical.name,
        parameters=weight.parameters,
        bytes=stored,
        active_bytes=active_bytes(inventory, weight, stored),
    )


def stored_bytes(weight: Weight, tier: Tier) -> int:
    """Return the exact bytes of a weight in a tier, which may be `native`. Raises TierError."""
    storage = parse_tier(weight.storage)
    return resolve(tier, storage).stored_bytes(weight.shape, weight.dtype)


def active_bytes(inventory: Inventory, weight: Weight, stored: int) -> int | None:
    """Return how many of a weight's `stored` bytes a generated token reads, None if unknown."""
    return _active(inventory, weight.role, weight.shape[0], stored)


def unquantized_assignment(inventory: Inventory) -> Assignment:
    """Return the norms, biases and sinks as one assignment, which no tier applies to."""
    active: list[int | None] = [
        _active_unquantized(inventory, tensor) for tensor in inventory.unquantized
    ]
    return Assignment(
        name="",
        role="norms, biases",
        layer=None,
        tier=UNQUANTIZED,
        storage="/".join(sorted({tensor.dtype.lower() for tensor in inventory.unquantized})),
        parameters=sum(tensor.parameters for tensor in inventory.unquantized),
        bytes=sum(tensor.bytes for tensor in inventory.unquantized),
        active_bytes=None if None in active else sum(b for b in active if b is not None),
    )


def _active_unquantized(inventory: Inventory, tensor: UnquantizedTensor) -> int | None:
    return _active(inventory, tensor.role, tensor.shape[0] if tensor.shape else 1, tensor.bytes)


def _active(inventory: Inventory, role: str, rows: int, stored: int) -> int | None:
    share = inventory.active_share(role, rows)
    return None if share is None else stored * share[0] // share[1]


def _require_same_weights(inventory: Inventory, tiers: Mapping[str, Tier]) -> None:
    names = {weight.name for weight in inventory.weights}
    for wrong, problem in (
        (names - tiers.keys(), "has no tier"),
        (tiers.keys() - names, "is unknown"),
    ):
        if wrong:
            raise PlanError(
                f"plan: weight {min(wrong)!r} {problem}{like_others(len(wrong))}: "
                f"not a plan for {inventory.source.name}."
            )
