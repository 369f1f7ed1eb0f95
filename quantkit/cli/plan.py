"""`quantkit plan`: a tier for every weight, and what that takes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import (
    ActiveBytes,
    BudgetOption,
    Context,
    Dtype,
    Json,
    MinTier,
    Pins,
    PlanFile,
    ProfileName,
    RecipeName,
    Refine,
    Reserve,
    Revision,
    RoundingName,
    Routers,
    Speed,
    Src,
    Tiers,
    Ties,
)
from quantkit.storage.paths import user_path

if TYPE_CHECKING:
    from quantkit.artifacts.profile import SensitivityProfile
    from quantkit.checkpoint.source import Source
    from quantkit.cli.choose import Asked


def plan(
    src: Src,
    budget: BudgetOption = None,
    profile: ProfileName = None,
    recipe: RecipeName = None,
    plan: PlanFile = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            parser=user_path,
            help="Save the plan as JSON, to read, edit and quantize by.",
        ),
    ] = None,
    pin: Pins = None,
    tie: Ties = None,
    tiers: Tiers = None,
    min_tier: MinTier = None,
    routers: Routers = False,
    active_bytes: ActiveBytes = None,
    speed: Speed = None,
    context: Context = "8k",
    reserve: Reserve = "1.5GB",
    rounding: RoundingName = None,
    refine: Refine = 0,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Solve a whole range of budgets; recipes beside it.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG", parser=user_path, help="Draw the frontier (needs the extra `plot`)."
        ),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Say why these weights have their tiers, and what would change next: a role, or "
            "a shell pattern on the end of the path; '*' for all.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    dtype: Dtype = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Choose a tier for every weight and count the bytes, before anything is downloaded.

    By a budget and a profile: the tiers of least predicted loss, proven optimal. By a recipe: its
    rules. Sizes are exact: the repo that `quantkit quantize` writes has just these bytes.

    `quantkit plan openai/gpt-oss-120b --recipe moringlabs-3.6bit`

    `quantkit plan openai/gpt-oss-20b --profile gpt-oss-20b-profile --budget mac:16GB -o plan.json`

    `quantkit plan SRC --profile P --frontier --plot frontier.png`

    Saved plans may be edited by hand: change a `tier`, count anew with
    `quantkit plan SRC --plan plan.json`, write it with `quantkit quantize SRC --plan plan.json -o
    OUT`. `quantkit diff a.json b.json` shows how two of them differ.
    """
    from quantkit.cli.choose import Asked, open_model, require_plots, settle_plan
    from quantkit.errors import InputError, OutputError
    from quantkit.sensitivity.store import load_profile
    from quantkit.storage.json_files import dump_json, write_atomically

    if plot is not None and not frontier:
        raise InputError("--plot draws the frontier; give --frontier, too.")
    if plot is not None:
        require_plots(plot)
    asked = Asked(
        recipe=recipe,
        plan=plan,
        budget=budget,
        profile=profile,
        pins=tuple(pin or ()),
        ties=tuple(tie or ()),
        tiers=tiers,
        min_tier=min_tier,
        routers=routers,
        active_bytes=active_bytes,
        speed=speed,
        context=context,
        reserve=reserve,
        rounding=rounding,
        refine=refine,
    )
    if not frontier:
        asked.require_one_way()
    elif refine or any(x is not None for x in (budget, recipe, plan, explain, output)):
        raise InputError(
            "--frontier solves a range of budgets; --budget, --recipe, --plan, --refine, --explain "
            "and --output do not go with it."
        )
    if profile is None and (budget is not None or frontier or explain is not None or refine):
        raise InputError(
            "a budget is spent by what weights lose. Give --profile PROFILE; make one with: "
            f"quantkit profile {src} -o PROFILE"
        )
    if output is not None and output.exists() and not force:
        raise OutputError(f"{output}: exists. Choose another file, or replace it with --force.")
    source = open_model(src, revision, dtype=dtype)
    known = None if profile is None else load_profile(profile, source.inventory)
    if frontier:
        assert known is not None
        _frontier(source, known, asked, plot, json)
        return
    chosen, known = settle_plan(source, asked, known)
    reasons = None
    if explain is not None:
        from quantkit.planning.explain import explain as find_reasons
        from quantkit.planning.explain import explanation_json

        assert known is not None
        reasons = find_reasons(chosen, source.inventory, known, asked.constraints(), explain)
    if output is not None:
        write_atomically(output, dump_json(chosen.to_json()))
    if reasons is not None:
        if json:
            console.print_json(explanation_json(reasons))
        else:
            tables.print_explanation(reasons)
    elif json:
        console.print_json(chosen.to_json())
    else:
        tables.print_plan(chosen, asked.bandwidth)


def _frontier(
    source: "Source", profile: "SensitivityProfile", asked: "Asked", plot: Path | None, json: bool
) -> None:
    from quantkit.planning.allocator import frontier, recipe_plans

    plans = frontier(source.inventory, profile, asked.constraints(), asked.active)
    recipes = recipe_plans(source.inventory, profile)
    if plot is not None:
        from quantkit.publish.plot import plot_frontier

        plot_frontier(plans, recipes, plot)
    if json:
        rows = {
            "frontier": [tables.plan_row(p) for p in plans],
            "recipes": [tables.plan_row(p) for p in recipes],
        }
        console.print_json(rows)
    else:
        tables.print_frontier(plans, recipes)
