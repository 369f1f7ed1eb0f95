"""`quantkit compare`: how close quants are to the native model."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import Json, Record

if TYPE_CHECKING:
    from quantkit.artifacts.report import Report
    from quantkit.source.source import Source


def require_made_from(report: "Report", name: str, native: "Source") -> None:
    """Raises InputError unless a repo was made from `native`: its card speaks of that one."""
    from quantkit.errors import InputError

    made_from, here = report.plan.source, native.inventory.source
    if made_from.structure != here.structure:
        raise InputError(
            f"{name}: was made from {made_from.name}, not from {here.name}; compare it to that, "
            "or leave --record out."
        )


def compare(
    native: Annotated[
        str,
        typer.Argument(
            metavar="NATIVE",
            help="The published checkpoint: a local folder, a Hub id, demo or demo-llama.",
        ),
    ],
    repos: Annotated[
        list[str],
        typer.Argument(metavar="OUT...", help="Quants of it: folders or Hub ids, by any tool."),
    ],
    text: Annotated[
        str,
        typer.Option(
            help="Text to judge on: a Hub data set, a .jsonl, .txt or .parquet file, or the small "
            "mix that ships with quantkit. Every fifth sequence of it is taken, and dialogues."
        ),
    ] = "default",
    tokens: Annotated[int, typer.Option(help="How many tokens of it.")] = 4096,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the text's order.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Draw the distributions (needs the extra `plot`)."),
    ] = None,
    record: Record = False,
    json: Json = False,
) -> None:
    """Measure how close quants are to the native model: KL divergence, top-1 agreement, perplexity.

    Runs one model after the other, a layer at a time, so it needs the memory of a layer only. The
    text is held out: quants that were calibrated on it are refused. Intervals are 95%, by
    bootstrap over sequences. The native model's last layer output is kept in the cache. `--record`
    puts the figures into the quantkit.json and model card of those that quantkit wrote.

    `quantkit compare openai/gpt-oss-20b gpt-oss-20b-q8 mlx-community/gpt-oss-20b-MXFP4-Q8`
    """
    from quantkit.backend import speed_hint
    from quantkit.cli.choose import open_model, require_plots
    from quantkit.judge import fidelity
    from quantkit.model.calibration import Request
    from quantkit.publish.report import read_report

    if plot is not None:
        require_plots(plot)
    reports = [read_report(Path(name)) for name in repos] if record else []
    source = open_model(native)
    for name, report in zip(repos, reports, strict=False):
        require_made_from(report, name, source)
    console.note(speed_hint())
    request = Request(text, tokens, sequence_length, seed)
    comparison = fidelity.prepare(source, repos, request)
    with console.progress(comparison.steps, "Comparing", "steps") as progress:
        results = fidelity.compare(comparison, progress)
    for name, report, found in zip(repos, reports, results, strict=False):
        named = replace(found, repo=Path(name).resolve().name)
        console.record(Path(name), replace(report, fidelity=named))
    if plot is not None:
        from quantkit.publish.plot import plot_fidelity

        plot_fidelity(results, plot)
    if json:
        about = {"native": source.inventory.source.name, "text": comparison.text.name}
        console.print_json(about | {"results": [result.to_json() for result in results]})
    else:
        tables.print_fidelity(results, comparison.text.name)
