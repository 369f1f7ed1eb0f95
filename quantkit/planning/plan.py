"""Plans: one tier per weight, with exact bytes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantkit.artifacts.inventory import Inventory, UnquantizedTensor, Weight
from quantkit.artifacts.plan import Assignment, Plan, tiers_sha256
from quantkit.artifacts.profile import SensitivityProfile
from quantkit.errors import PlanError, TierError
from quantkit.formats.tiers import Tier, canonical, parse_tier, resolve
from quantkit.storage.json_files import require_kind

UNQUANTIZED = "kept"


def make_plan(inventory: Inventory, tiers: Mapping[str, Tier], origin: str) -> Plan:
    """The plan that stores each weight in `tiers[name]`.

    Raises TierError for a tier that does not fit, PlanError when `tiers` names another set of
    weights than the inventory.
    """
    _require_same_weights(inventory, tiers)
    choices = tuple(_choice(inventory, w, tiers[w.name]) for w in inventory.weights)
    return Plan(
        inventory.source, inventory.model_type, origin, choices, unquantized_assignment(inventory)
    )


def with_predictions(plan: Plan, profile: SensitivityProfile) -> Plan:
    """`plan` with the losses that a profile predicts, None for tiers that it does not know.

    What was proven or measured of other predictions is forgotten.
    """
    losses = {w.name: {loss.tier: loss.kl for loss in w.losses} for w in profile.weights}
    choices = tuple(replace(c, kl=losses[c.name].get(c.tier)) for c in plan.choices)
    return replace(plan, choices=choices, optimality=None, measured_kl=None)


def read_plan(data: Mapping[str, Any], inventory: Inventory, where: str) -> Plan:
    """The plan in a JSON file, its bytes counted anew: of an edited one only names and tiers are
    taken, and the text it was calibrated on.

    Raises PlanError when it was made for another checkpoint, TierError for its tiers.
    """
    require_kind(data, "plan", where)
    try:
        structure = data["source"]["structure"]
        origin, kept = str(data.get("origin", "plan")), data.get("kept", {})
        named = [(weight["name"], weight["tier"]) for weight in data["weights"]]
        tiers = {name: _parse_tier(where, name, tier) for name, tier in named}
        edited = tiers_sha256(named) != data["tiers_sha256"]
        if kept.get("tier", UNQUANTIZED) != UNQUANTIZED:
            raise PlanError(f"{where}: norms, biases and sinks are kept as they are; no tier fits.")
    except (KeyError, TypeError, AttributeError) as exc:
        raise PlanError(f"{where}: not a complete plan ({exc} is missing or malformed).") from exc
    if len(tiers) != len(data["weights"]):
        raise PlanError(f"{where}: names a weight twice.")
    if structure != inventory.source.structure:
        raise PlanError(
            f"{where}: made for another checkpoint ({data['source'].get('name')}), "
            f"not for {inventory.source.name}. Plan anew."
        )
    if edited and not origin.startswith("edited"):
        origin = f"edited from {origin}"
    made = make_plan(inventory, tiers, origin)
    saved = Plan.from_json(data, where)
    if edited:
        return replace(
            made,
            calibration_texts=saved.calibration_texts,
            rounding=saved.rounding,
            tuning_steps=saved.tuning_steps,
        )
    losses = {choice.name: choice.kl for choice in saved.choices}
    choices = tuple(replace(choice, kl=losses[choice.name]) for choice in made.choices)
    return replace(
        made,
        choices=choices,
        optimality=saved.optimality,
        calibration_texts=saved.calibration_texts,
        rounding=saved.rounding,
        tuning_steps=saved.tuning_steps,
        measured_kl=saved.measured_kl,
    )


def _parse_tier(where: str, weight: str, name: str) -> Tier:
    try:
        return parse_tier(name)
    except TierError as exc:
        raise TierError(f"{where}: {weight}: {exc}") from exc


def _choice(inventory: Inventory, weight: Weight, tier: Tier) -> Assignment:
    storage = parse_tier(weight.storage)
    physical = resolve(tier, storage)
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
    """Exact bytes of a weight in a tier, `native` meaning as it is held. Raises TierError."""
    storage = parse_tier(weight.storage)
    return resolve(tier, storage).stored_bytes(weight.shape, weight.dtype)


def active_bytes(inventory: Inventory, weight: Weight, stored: int) -> int | None:
    """Of a weight's `stored` bytes those read per generated token; None where it is not known."""
    return _active(inventory, weight.role, weight.shape[0], stored)


def unquantized_assignment(inventory: Inventory) -> Assignment:
    """The norms, biases and sinks, which no tier applies to."""
    active: list[int | None] = [_active_kept(inventory, tensor) for tensor in inventory.kept]
    return Assignment(
        name="",
        role="norms, biases",
        layer=None,
        tier=UNQUANTIZED,
        storage="/".join(sorted({tensor.dtype.lower() for tensor in inventory.kept})),
        parameters=sum(tensor.parameters for tensor in inventory.kept),
        bytes=sum(tensor.bytes for tensor in inventory.kept),
        active_bytes=None if None in active else sum(b for b in active if b is not None),
    )


def _active_kept(inventory: Inventory, tensor: UnquantizedTensor) -> int | None:
    return _active(inventory, tensor.role, tensor.shape[0] if tensor.shape else 1, tensor.bytes)


def _active(inventory: Inventory, role: str, rows: int, stored: int) -> int | None:
    share = inventory.active_share(role, rows)
    return None if share is None else stored * share[0] // share[1]


def _require_same_weights(inventory: Inventory, tiers: Mapping[str, Tier]) -> None:
    names = {weight.name for weight in inventory.weights}
    for wrong, what in (
        (names - tiers.keys(), "has no tier"),
        (tiers.keys() - names, "is unknown"),
    ):
        if wrong:
            raise PlanError(
                f"plan: weight {min(wrong)!r} {what} (one of {len(wrong)} such): "
                f"not a plan for {inventory.source.name}."
            )
