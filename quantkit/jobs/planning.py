"""Plan: from a request for tiers to a plan, with the profile that chose them."""

from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.artifacts.experts import parse_expert_counts
from quantkit.artifacts.memory import MemoryTarget
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.checkpoint.pruned import require_prunable
from quantkit.checkpoint.source import Source
from quantkit.errors import InputError, PlanError, in_field
from quantkit.formats.tiers import parse_tier
from quantkit.planning.allocator import plan_by_budget
from quantkit.planning.budget import Budget, parse_budget, parse_speed
from quantkit.planning.constraints import Constraints, parse_pins
from quantkit.planning.plan import read_plan, with_predictions
from quantkit.planning.recipe import (
    fallen_back,
    idle_rules,
    load_recipe,
    plan_by_recipe,
    recipe_names,
)
from quantkit.progress import Progress
from quantkit.quantizers.registry import DEFAULT_QUANTIZER, RTN, find_quantizer
from quantkit.storage.json_files import load_json
from quantkit.units import parse_bytes, parse_count


@dataclass(frozen=True)
class PlanRequest:
    """A request for tiers: by a `budget`, a `recipe`, or a `plan` file, exactly one of them.

    The other fields are the options of `quantkit plan`, as a user writes them: `profile` is a
    folder or a Hub id, `pins` are `PATTERN=TIER`, `tiers` is a list such as `q4g64,q3g64`, `refine`
    the number of rounds in which the plan is measured and corrected. `experts` are numbers of
    experts to keep such as `96`, or `auto`: all, or as many as is best.
    """

    budget: str | None = None
    recipe: str | None = None
    plan: Path | None = None
    profile: str | None = None
    pins: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()
    tiers: str | None = None
    min_tier: str | None = None
    routers: bool = False
    active_bytes: str | None = None
    speed: str | None = None
    context: str | None = None
    reserve: str | None = None
    quantizer: str | None = None
    refine: int = 0
    experts: str | None = None

    def require_consistent(self) -> None:
        """Check that there is exactly one way to choose tiers, and no option for another way.

        Raises InputError.
        """
        if (self.recipe, self.plan, self.budget).count(None) != 2:
            raise InputError(
                "choose tiers by exactly one of `budget`, `recipe` and `plan`. Recipes: "
                f"{', '.join(recipe_names())}."
            )
        if self.quantizer is not None:
            find_quantizer(self.quantizer)
        if self.budget is None:
            if replace(self, quantizer=RTN).constraints() != Constraints():
                raise InputError("`pin`, `tie`, `tiers`, `min_tier` and `routers` need a `budget`.")
            if (self.active_bytes, self.speed) != (None, None):
                raise InputError("`active_bytes` and `speed` need a `budget`.")
            if self.refine:
                raise InputError("`refine` needs a `budget`.")
            if self.experts is not None:
                raise InputError("`experts` needs a `budget`.")
        if self.plan is not None and (self.context, self.reserve) != (None, None):
            raise InputError("`context` and `reserve` are part of the `plan`; leave them out.")
        if self.active_bytes is not None and self.speed is not None:
            raise InputError("`active_bytes` and `speed` set the same limit; use one of them.")

    @property
    def quantizer_name(self) -> str:
        """The quantizer to use unless a plan file names its own: calibrated for a budget."""
        return self.quantizer or (DEFAULT_QUANTIZER if self.budget is not None else RTN)

    def constraints(self, source: Source | None = None) -> Constraints:
        """Return the parsed constraints. Raises InputError.

        Without a `source` all experts are kept.
        """
        if self.quantizer is not None:
            find_quantizer(self.quantizer)
        names = () if self.tiers is None else self.tiers.split(",")
        with in_field("tiers"):
            tiers = tuple(parse_tier(name) for name in names if name.strip())
        with in_field("min_tier"):
            min_tier = None if self.min_tier is None else parse_tier(self.min_tier)
        if self.tiers is not None and not tiers:
            raise InputError("`tiers` is empty. Name tiers such as q4g64,q3g64.")
        return Constraints(
            pins=parse_pins(self.pins),
            tiers=None if self.tiers is None else tiers,
            min_tier=min_tier,
            ties=self.ties,
            routers=self.routers,
            quantizer=self.quantizer or DEFAULT_QUANTIZER,
            expert_counts=() if source is None else self._expert_counts(source),
        )

    @property
    def memory_target(self) -> MemoryTarget:
        """Context and reserve beside the weights. Raises InputError."""
        target = MemoryTarget()
        if self.context is not None:
            with in_field("context"):
                target = replace(target, context=parse_count(self.context))
        if self.reserve is not None:
            with in_field("reserve"):
                target = replace(target, reserve=parse_bytes(self.reserve))
        return target

    @property
    def bandwidth(self) -> int | None:
        """The memory bandwidth in bytes per second, if a speed is requested."""
        return parse_speed(self.speed)[1] if self.speed else None

    @property
    def active_limit(self) -> int | None:
        """The bytes that may be read per token. Raises InputError."""
        if self.speed is not None:
            with in_field("speed"):
                return parse_speed(self.speed)[0]
        with in_field("active_bytes"):
            return None if self.active_bytes is None else parse_bytes(self.active_bytes)

    def _expert_counts(self, source: Source) -> tuple[int, ...]:
        """Return the numbers of experts to choose from, none for all of them. Raises InputError."""
        if self.experts is None:
            return ()
        require_prunable(source)
        return parse_expert_counts(self.experts, source.inventory)

    def parsed_budget(self, source: Source) -> Budget:
        """Return the budget for a checkpoint. Raises InputError."""
        assert self.budget is not None
        settings = source.checkpoint.settings
        inventory, target = source.inventory, self.memory_target
        return parse_budget(self.budget, inventory, settings, target, self.active_limit)


@dataclass(frozen=True)
class Planned:
    """A plan, and the profile that chose it; None if no profile was needed."""

    plan: Plan
    profile: SensitivityProfile | None


def choose_plan(
    source: Source,
    request: PlanRequest,
    profile: SensitivityProfile | None = None,
    progress: Progress | None = None,
) -> Planned:
    """Return the plan of a request, refined if requested. Raises InputError.

    A budget needs a `profile`; recipes and plan files get predicted KL costs from it.
    """
    request.require_consistent()
    progress = progress or Progress()
    target = request.memory_target
    if request.budget is None:
        plan = _given_plan(source, request, profile, progress)
        return Planned(replace(plan, memory_target=plan.memory_target or target), profile)
    if profile is None:
        raise InputError("a `budget` needs a `profile`.")
    budget, constraints = request.parsed_budget(source), request.constraints(source)
    if not request.refine:
        return Planned(plan_by_budget(source.inventory, profile, budget, constraints), profile)
    from quantkit.jobs.refine import refine  # runs the model

    measured = refine(source, profile, budget, constraints, request.refine, progress)
    for one in measured:
        progress.note(
            f"to nearest, measured {one.kl:.4g}, predicted {one.predicted:.4g}: {one.plan.origin}"
        )
    return Planned(measured[0].plan, measured[0].profile)


def _given_plan(
    source: Source, request: PlanRequest, profile: SensitivityProfile | None, progress: Progress
) -> Plan:
    """Return the plan of a recipe or a plan file."""
    inventory = source.inventory
    if request.plan is not None:
        plan = read_plan(load_json(request.plan, PlanError), inventory, str(request.plan))
    else:
        assert request.recipe is not None
        recipe = load_recipe(request.recipe)
        plan = plan_by_recipe(inventory, recipe)
        if names := fallen_back(inventory, recipe):
            progress.note(
                f"recipe {recipe.name}: {recipe.fallback} for {len(names)} weights whose width "
                f"does not fit their tier ({names[0]})"
            )
        if request.recipe not in recipe_names():  # shipped recipes are for many models
            for number in idle_rules(inventory, recipe):
                progress.note(f"recipe {recipe.name}: rule {number} decides no weight")
    if request.quantizer is not None:
        plan = replace(plan, quantizer=request.quantizer)
    if profile is not None and plan.predicted_kl is None:
        plan = with_predictions(plan, profile)
    return plan
