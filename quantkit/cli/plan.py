"""`quantkit plan`: a tier for every weight, and the exact bytes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import (
    OUTPUT,
    Force,
    Json,
    Plot,
    SourceOptions,
    Src,
    TierOptions,
    named_path,
)

if TYPE_CHECKING:
    from quantkit.artifacts.sensitivity import SensitivityProfile
    from quantkit.checkpoint.source import Source
    from quantkit.jobs.planning import Planned, PlanRequest


@dataclass(frozen=True)
class PlanOutput:
    """The outputs of a plan."""

    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            parser=named_path,
            rich_help_panel=OUTPUT,
            help="Save the plan as JSON.",
        ),
    ] = None
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier",
            rich_help_panel=OUTPUT,
            help="Solve a range of budgets, and list the recipes beside them.",
        ),
    ] = False
    plot: Plot = None
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            rich_help_panel=OUTPUT,
            help="Explain the tiers of these weights, and the next steps: a role, or a shell "
            "pattern on the end of the path; '*' for all.",
        ),
    ] = None
    force: Force = False


def plan(
    src: Src,
    tiers: TierOptions,
    opening: SourceOptions,
    output: PlanOutput,
    json: Json = False,
) -> None:
    """Choose a tier for every weight and count the bytes, before any download.

    `--budget` finds the tiers whose sum of KL costs is least, proven optimal; `--recipe` follows
    rules. Sizes are exact. A saved plan may be edited: change a `tier`, then count it again with
    `--plan`.

    `quantkit plan openai/gpt-oss-120b --recipe moringlabs-3.6bit`
    """
    from quantkit.errors import in_field
    from quantkit.jobs.planning import choose_plan
    from quantkit.sensitivity.store import load_profile

    request = tiers.request()
    if not output.frontier:
        request.require_consistent()
    _require_consistent(src, tiers, output)
    if output.plot is not None:
        from quantkit.publish.plot import require_plots

        require_plots(output.plot)
    source = opening.open(src)
    profile = None
    if tiers.profile is not None:
        with in_field("profile"):
            profile = load_profile(tiers.profile, source.inventory)
    if output.frontier:
        assert profile is not None
        _frontier(source, profile, request, output.plot, json)
        return
    with console.Bars() as progress:
        planned = choose_plan(source, request, profile, progress)
    _show(planned, source, request, output, json)


def _require_consistent(src: str, tiers: TierOptions, output: PlanOutput) -> None:
    """Check the options that `plan` alone has. Raises InputError."""
    from quantkit.errors import InputError, OutputError

    if output.output is not None and output.output.exists() and not output.force:
        raise OutputError(
            f"{output.output}: exists. Choose another file, or replace it with `force`."
        )

    if output.plot is not None and not output.frontier:
        raise InputError("`plot` draws the frontier; add `frontier`.")
    others = (tiers.budget, tiers.recipe, tiers.plan, output.explain, output.output)
    if output.frontier and (tiers.refine or any(value is not None for value in others)):
        raise InputError(
            "`frontier` solves a range of budgets; leave out `budget`, `recipe`, `plan`, `refine`, "
            "`explain` and `output`."
        )
    options = {"budget": tiers.budget, "frontier": output.frontier, "explain": output.explain}
    given = [name for name, value in options.items() if value not in (None, False)]
    if tiers.profile is None and given:
        raise InputError(
            f"`{given[0]}` needs the KL costs of weights. Give `profile` PROFILE; make one with: "
            f"quantkit profile {src} -o PROFILE"
        )


def _show(
    planned: "Planned", source: "Source", request: "PlanRequest", output: PlanOutput, json: bool
) -> None:
    """Print and save the plan, or its explanation."""
    from quantkit.storage.json_files import dump_json, write_atomically

    explanation = None
    if output.explain is not None:
        from quantkit.planning.explain import explain, explanation_json

        assert planned.profile is not None
        constraints = request.constraints()
        explanation = explain(
            planned.plan, source.inventory, planned.profile, constraints, output.explain
        )
    if output.output is not None:
        write_atomically(output.output, dump_json(planned.plan.to_json()))
    if explanation is not None and json:
        console.print_json(explanation_json(explanation))
    elif explanation is not None:
        tables.print_explanation(explanation)
    elif json:
        console.print_json(planned.plan.to_json())
    else:
        tables.print_plan(planned.plan, request.bandwidth)
    if output.output is not None and not json:
        print(f"Saved to {output.output}.")


def _frontier(
    source: "Source",
    profile: "SensitivityProfile",
    request: "PlanRequest",
    plot: Path | None,
    json: bool,
) -> None:
    from quantkit.planning.frontier import frontier, recipe_plans

    inventory, constraints, active = source.inventory, request.constraints(), request.active_limit
    plans = frontier(inventory, profile, constraints, active)
    pruned = []
    if request.experts is not None:
        pruned = frontier(inventory, profile, request.constraints(source), active)
    recipes = recipe_plans(inventory, profile)
    if plot is not None:
        from quantkit.publish.plot import plot_frontier

        plot_frontier(plans, recipes, plot, pruned)
    if json:
        rows = {
            "frontier": [tables.plan_row(p) for p in plans],
            "pruned": [tables.plan_row(p) for p in pruned],
            "recipes": [tables.plan_row(p) for p in recipes],
        }
        console.print_json(rows)
    else:
        tables.print_frontier(plans, recipes, pruned)
