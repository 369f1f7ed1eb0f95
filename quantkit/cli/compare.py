"""`quantkit compare`: the fidelity of quants to the native model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.artifacts.fidelity import EVALUATED_TOKENS
from quantkit.cli import console, tables
from quantkit.cli.options import (
    TEXT,
    Json,
    Memory,
    Plot,
    Record,
    SequenceLength,
    TrustRemoteCode,
    memory_bytes,
)

if TYPE_CHECKING:
    from quantkit.artifacts.fidelity import Fidelity


@dataclass(frozen=True)
class EvaluationOptions:
    """The text to evaluate on."""

    text: Annotated[
        str,
        typer.Option(
            rich_help_panel=TEXT,
            help="Hub data set, a .jsonl, .txt or .parquet file, or the shipped mix (default). "
            "Only documents that calibrate nothing are evaluated, and some dialogues.",
        ),
    ] = "default"
    tokens: Annotated[int, typer.Option(rich_help_panel=TEXT, help="Tokens to evaluate.")] = (
        EVALUATED_TOKENS
    )
    sequence_length: SequenceLength = 256
    seed: Annotated[
        int, typer.Option(min=0, rich_help_panel=TEXT, help="Seed of the order of the text.")
    ] = 0
    memory: Memory = None
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True)
class ResultOptions:
    """Outputs of the results."""

    plot: Plot = None
    record: Record = False
    json: Json = False


def compare(
    native: Annotated[
        str,
        typer.Argument(
            metavar="NATIVE",
            help="Published checkpoint: a local folder, a Hub id, demo or demo-llama.",
        ),
    ],
    repos: Annotated[
        list[str],
        typer.Argument(metavar="OUT...", help="Quants of it by any tool: folders or Hub ids."),
    ],
    options: EvaluationOptions,
    results: ResultOptions,
) -> None:
    """Compare quants to the native model: KL divergence, top-1 agreement, perplexity.

    Runs one model after the other, a layer at a time. The documents are held out: quants that were
    calibrated on them are refused. Intervals are 95%, by bootstrap over documents.

    `quantkit compare openai/gpt-oss-20b gpt-oss-20b-q8 mlx-community/gpt-oss-20b-MXFP4-Q8`
    """
    from quantkit.backend import speed_hint
    from quantkit.backend.memory_limits import limited_memory
    from quantkit.calibration.calibration_set import CalibrationSpec
    from quantkit.checkpoint.source import STORED
    from quantkit.jobs.compare import compare as run
    from quantkit.jobs.compare import require_made_from
    from quantkit.jobs.open_model import open_model
    from quantkit.publish.record import read_report

    if results.plot is not None:
        from quantkit.publish.plot import require_plots

        require_plots(results.plot)
    reports = [(name, read_report(Path(name))) for name in repos] if results.record else []
    source = open_model(native, dtype=STORED, trust_remote_code=options.trust_remote_code)
    if reports:
        require_made_from(source, reports)
    console.note(speed_hint())
    spec = CalibrationSpec(options.text, options.tokens, options.sequence_length, options.seed)
    with console.Bars() as progress, limited_memory(memory_bytes(options.memory)):
        measured = run(source, repos, spec, progress=progress)
    _show(measured, results)
    for (name, _), one in zip(reports, measured, strict=False):
        console.record(Path(name), fidelity=replace(one, repo=Path(name).resolve().name))


def _show(measured: "list[Fidelity]", results: ResultOptions) -> None:
    if results.plot is not None:
        from quantkit.publish.plot import plot_fidelity

        plot_fidelity(measured, results.plot)
    first = measured[0]
    if results.json:
        names = {"native": first.native, "text": first.text}
        console.print_json(names | {"results": [one.to_json() for one in measured]})
    else:
        tables.print_fidelity(measured, first.text)
