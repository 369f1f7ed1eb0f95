"""`quantkit compare`: how close quants are to the native model."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import Json, Record, TrustRemoteCode
from quantkit.storage.paths import user_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantkit.artifacts.report import Report
    from quantkit.checkpoint.source import Source


def require_made_from(native: "Source", reports: "Mapping[str, Report]") -> None:
    """Raises InputError unless all repos were made from `native`: their cards speak of that one."""
    from quantkit.artifacts.inventory import with_hashes
    from quantkit.checkpoint.source import file_hashes, with_values
    from quantkit.errors import InputError

    native = with_values(native)
    here = with_hashes(native.inventory.source, file_hashes(native))
    for name, report in reports.items():
        made_from = report.plan.source
        if (made_from.structure, made_from.files) != (here.structure, here.files):
            raise InputError(
                f"{name}: was made from {made_from.name}, not from this {here.name}; compare it to "
                "that, or leave --record out."
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
        typer.Option(
            metavar="PNG", parser=user_path, help="Draw the distributions (needs the extra `plot`)."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    record: Record = False,
    json: Json = False,
) -> None:
    """Measure how close quants are to the native model: KL divergence, top-1 agreement, perplexity.

    Runs one model after the other, a layer at a time, so it needs the memory of a layer only. The
    text is held out: quants that were calibrated on it are refused. Intervals are 95%, by
    bootstrap over sequences. The native model's last layer output is kept in the cache. `--record`
    puts the figures into the quantkit.json and model card of the repos, which have to be folders
    that quantkit made from NATIVE.

    `quantkit compare openai/gpt-oss-20b gpt-oss-20b-q8 mlx-community/gpt-oss-20b-MXFP4-Q8`
    """
    from quantkit.backend import speed_hint
    from quantkit.calibration.text import CalibrationSpec
    from quantkit.checkpoint.source import STORED
    from quantkit.cli.choose import open_model, require_plots
    from quantkit.evaluation import fidelity
    from quantkit.publish.report import read_report

    if plot is not None:
        require_plots(plot)
    reports = [read_report(Path(name)) for name in repos] if record else []
    source = open_model(native, dtype=STORED, trust_remote_code=trust_remote_code)
    if record:
        require_made_from(source, dict(zip(repos, reports, strict=True)))
    console.note(speed_hint())
    request = CalibrationSpec(text, tokens, sequence_length, seed)
    comparison = fidelity.prepare(source, repos, request)
    console.note(tables.skipped_rows(comparison.text.about))
    with console.progress(comparison.steps, "Comparing", "steps") as progress:
        results = fidelity.compare(comparison, progress)
    if plot is not None:
        from quantkit.publish.plot import plot_fidelity

        plot_fidelity(results, plot)
    if json:
        about = {"native": source.inventory.source.name, "text": comparison.text.about.name}
        console.print_json(about | {"results": [result.to_json() for result in results]})
    else:
        tables.print_fidelity(results, comparison.text.about.name)
    for name, found in zip(repos if record else (), results, strict=False):
        console.record(Path(name), fidelity=replace(found, repo=Path(name).resolve().name))
