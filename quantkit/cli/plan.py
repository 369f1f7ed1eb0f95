"""`quantkit plan`: a tier for every weight, and what that takes."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.options import Json, PlanFile, RecipeName, Revision, Src


def plan(
    src: Src,
    recipe: RecipeName = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Save the plan as JSON, to read, edit and quantize by."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    plan: PlanFile = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Choose a tier for every weight and count the bytes, before anything is downloaded.

    Sizes are exact: the repo that `quantkit quantize` writes has just these bytes.

    `quantkit plan openai/gpt-oss-120b --recipe moringlabs-3.6bit`

    `quantkit plan SRC -r mxfp4-q8 -o plan.json`, then edit a `tier` in plan.json, then
    `quantkit plan SRC --plan plan.json` to count anew, and
    `quantkit quantize SRC --plan plan.json -o OUT`
    """
    from quantkit.cli.choose import choose_plan, open_model
    from quantkit.errors import OutputError
    from quantkit.jsonfile import dump_json, write_atomically

    if output is not None and output.exists() and not force:
        raise OutputError(f"{output}: exists. Choose another file, or replace it with --force.")
    chosen = choose_plan(open_model(src, revision).inventory, recipe, plan)
    if output is not None:
        write_atomically(output, dump_json(chosen.to_json()))
    if json:
        console.print_json(chosen.to_json())
    else:
        console.print_plan(chosen)
