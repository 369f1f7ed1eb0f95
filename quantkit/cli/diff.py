"""`quantkit diff`: the difference of two saved plans."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import Json, named_path

SavedPlan = Annotated[
    Path,
    typer.Argument(metavar="PLAN", parser=named_path, help="Plan saved by `quantkit plan -o`."),
]


def diff(a: SavedPlan, b: SavedPlan, json: Json = False) -> None:
    """Show the weights that two saved plans store differently, with bytes and predicted KL.

    `quantkit diff 16GB.json 24GB.json`
    """
    from quantkit.errors import PlanError
    from quantkit.planning.explain import diff as find_differences
    from quantkit.planning.plan import unedited_plan
    from quantkit.storage.json_files import load_json

    before, after = (unedited_plan(load_json(path, PlanError), str(path)) for path in (a, b))
    differences = find_differences(before, after)
    if json:
        console.print_json([asdict(difference) for difference in differences])
    else:
        tables.print_differences(differences)
