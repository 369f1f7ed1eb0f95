"""From what a person asked for to a plan."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.artifacts.plan import Plan
from quantkit.artifacts.profile import SensitivityProfile
from quantkit.cli import console
from quantkit.errors import InputError, PlanError
from quantkit.formats.tiers import QUANTIZERS, parse_tier
from quantkit.macs import MemoryTarget
from quantkit.planning.allocator import Constraints, Limits, parse_pins, plan_by_budget
from quantkit.planning.budget import parse_budget, parse_room, parse_speed
from quantkit.planning.plan import read_plan, with_predictions
from quantkit.planning.recipe import (
    fallen_back,
    idle_rules,
    load_recipe,
    plan_by_recipe,
    recipe_names,
)
from quantkit.storage.json_files import load_json
from quantkit.units import parse_bytes

if TYPE_CHECKING:
    from quantkit.calibration.text import CalibrationSpec
    from quantkit.checkpoint.source import Source

DEMOS = ("demo", "demo-llama")


def open_model(
    name: str,
    revision: str | None = None,
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> "Source":
    """The source called `name`: a folder, a Hub id, or one of the two small models that are built
    on the spot, `demo` and `demo-llama`. Raises InputError."""
    from quantkit.checkpoint.source import STATED, open_source

    if name in DEMOS and not Path(name).exists():
        from quantkit.demo import build

        built = build.demo_checkpoint() if name == "demo" else build.plain_checkpoint()
        name = str(built)
    return open_source(name, revision, floats=dtype or STATED, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class Asked:
    """What a person asked for, as they wrote it."""

    recipe: str | None = None
    plan: Path | None = None
    budget: str | None = None
    profile: str | None = None
    pins: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()
    tiers: str | None = None
    min_tier: str | None = None
    routers: bool = False
    active_bytes: str | None = None
    speed: str | None = None
    context: str = "8k"
    reserve: str = "1.5GB"
    rounding: str | None = None
    refine: int = 0

    def require_one_way(self) -> None:
        """Raises InputError unless there is just one way to choose tiers."""
        if (self.recipe, self.plan, self.budget).count(None) != 2:
            raise InputError(
                "say how to choose tiers: --budget B, --recipe NAME or --plan FILE, just one of "
                f"them. Recipes: {', '.join(recipe_names())}."
            )
        if self.budget is None and replace(self, rounding="rtn").constraints() != Constraints():
            raise InputError("--pin, --tie, --tiers, --min-tier and --routers go with --budget.")
        if self.budget is None and (self.active_bytes, self.speed) != (None, None):
            raise InputError("--active-bytes and --speed go with --budget.")
        if self.budget is None and self.refine:
            raise InputError("--refine goes with --budget.")
        if self.active_bytes is not None and self.speed is not None:
            raise InputError("--active-bytes and --speed say the same; give one of them.")

    def constraints(self) -> Constraints:
        """Raises InputError."""
        if self.rounding is not None and self.rounding not in QUANTIZERS:
            known = ", ".join(QUANTIZERS)
            raise InputError(f"there is no rounding {self.rounding!r}. Roundings: {known}.")
        names = () if self.tiers is None else self.tiers.split(",")
        tiers = tuple(parse_tier(name) for name in names if name.strip())
        if self.tiers is not None and not tiers:
            raise InputError("--tiers: no tiers are named. Name some such as q4g64,q3g64.")
        return Constraints(
            pins=parse_pins(self.pins),
            tiers=None if self.tiers is None else tiers,
            min_tier=None if self.min_tier is None else parse_tier(self.min_tier),
            ties=self.ties,
            routers=self.routers,
            rounding=self.rounding or "gptq",
        )

    @property
    def room(self) -> MemoryTarget:
        """What memory must hold beside the weights. Raises InputError."""
        return parse_room(self.context, self.reserve)

    @property
    def bandwidth(self) -> int | None:
        """Bytes per second, where a speed is asked for."""
        return parse_speed(self.speed)[1] if self.speed else None

    @property
    def active(self) -> int | None:
        """Bytes that may be read per token. Raises InputError."""
        if self.speed is not None:
            return parse_speed(self.speed)[0]
        return None if self.active_bytes is None else parse_bytes(self.active_bytes)

    def limits(self, source: "Source") -> Limits:
        """Raises InputError."""
        assert self.budget is not None
        config = source.checkpoint.config
        budget = parse_budget(self.budget, source.inventory, config, self.room)
        return Limits(budget.bytes, self.active, budget.about)


def choose_plan(source: "Source", asked: Asked, profile: SensitivityProfile | None = None) -> Plan:
    """The plan of a budget, a recipe, or a plan file. Raises InputError.

    With a `profile`, which a budget needs, recipes and plans carry their predicted losses.
    """
    asked.require_one_way()
    inventory = source.inventory
    if asked.budget is not None:
        assert profile is not None
        return plan_by_budget(inventory, profile, asked.limits(source), asked.constraints())
    if asked.plan is not None:
        plan = read_plan(load_json(asked.plan, PlanError), inventory, str(asked.plan))
    else:
        assert asked.recipe is not None
        loaded = load_recipe(asked.recipe)
        plan = plan_by_recipe(inventory, loaded)
        if fallen := fallen_back(inventory, loaded):
            console.note(
                f"recipe {loaded.name}: the tier of {len(fallen)} weights does not fit their width "
                f"({fallen[0]}); they get {loaded.fallback}"
            )
        if asked.recipe not in recipe_names():  # those that ship are made for many models
            for number in idle_rules(inventory, loaded):
                console.note(f"recipe {loaded.name}: rule {number} decides no weight")
    if profile is not None and plan.predicted_kl is None:
        plan = with_predictions(plan, profile)
    return plan if asked.rounding is None else replace(plan, rounding=asked.rounding)


def profile_for(
    source: "Source", asked: Asked, out: Path, text: "CalibrationSpec", force: bool
) -> SensitivityProfile | None:
    """The profile that is named, else for a budget the one beside `out`, made first if it is not
    there. None where none is needed. Raises InputError."""
    from quantkit.sensitivity.store import load_profile

    if asked.profile is not None:
        return load_profile(asked.profile, source.inventory)
    if asked.budget is None:
        return None
    from quantkit.backend import speed_hint
    from quantkit.checkpoint.source import with_values
    from quantkit.sensitivity.entries import DEFAULT_TIERS, unmeasured
    from quantkit.sensitivity.measure import Settings, make, prepare

    constraints = asked.constraints()
    named = [*(constraints.tiers or ()), *(tier for _, tier in constraints.pins)]
    wanted = [*DEFAULT_TIERS, *(tier.name for tier in named if tier.quantized)]
    tiers = tuple(dict.fromkeys(wanted))
    # What cannot be is better known before hours of work: sizes need no measurement.
    plan_by_budget(
        source.inventory, unmeasured(source.inventory, tiers), asked.limits(source), constraints
    )
    folder = out.with_name(f"{out.name}-profile")
    settings = Settings(text, tiers)
    console.note(speed_hint())
    source = with_values(source)
    try:
        profiling = prepare(source, folder, settings)
    except InputError:
        if not force:
            raise
        profiling = prepare(source, folder, settings, force)
    with console.progress(profiling.steps, "Profiling", "steps") as progress:
        return make(profiling, progress)


def settle_plan(
    source: "Source", asked: Asked, profile: SensitivityProfile | None
) -> tuple[Plan, SensitivityProfile | None]:
    """The plan that was asked for, refined if that was asked too, and the profile that chose it.
    Raises InputError."""
    if not asked.refine:
        return choose_plan(source, asked, profile), profile
    assert profile is not None
    return _refined(source, profile, asked)


def _refined(
    source: "Source", profile: SensitivityProfile, asked: Asked
) -> tuple[Plan, SensitivityProfile]:
    """The plan of a budget that was measured best, all being shown, and the profile, corrected,
    that chose it. Raises InputError."""
    from quantkit.backend import speed_hint
    from quantkit.jobs.pipeline import refine

    console.note(speed_hint())
    limits, constraints = asked.limits(source), asked.constraints()
    with console.progress(0, "Measuring plans,") as progress:
        measured_plans = refine(
            source, profile, limits, constraints, rounds=asked.refine, progress=progress
        )
    for measured_plan in measured_plans:
        console.note(
            f"measured {measured_plan.kl:.4g}, predicted {measured_plan.plan.predicted_kl or 0:.4g}: "
            f"{measured_plan.plan.origin}"
        )
    return measured_plans[0].plan, measured_plans[0].profile


def require_plots(path: Path) -> None:
    """Raises InputError where matplotlib is not installed, or no picture can be put at `path`."""
    from quantkit.publish.plot import require_picture

    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'quantkit[plot]'")
    require_picture(path)
