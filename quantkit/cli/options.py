"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Src = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A checkpoint: a local folder, a Hub id such as openai/gpt-oss-20b, or a small "
        "model to try things on: demo (a gpt-oss) or demo-llama.",
    ),
]
Repo = Annotated[Path, typer.Argument(metavar="OUT", help="A repo that quantkit wrote.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub id. Default: its main branch.")
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="A shipped recipe (mxfp4-q8, mxfp4-q4, moringlabs-3.6bit, optiq-style-4-8, "
        "uniform-4, uniform-3), or a .toml file of your own.",
    ),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", "-p", help="A plan that `quantkit plan -o` saved.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
