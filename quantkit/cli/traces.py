"""`quantkit traces`: the model's own answers, as text to calibrate or to evaluate on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.options import OUTPUT, TEXT, Force, Json, Model, TrustRemoteCode, named_path
from quantkit.cli.sampling import SamplingOptions


@dataclass(frozen=True)
class TraceOptions:
    """The prompts, and the file to write."""

    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            parser=named_path,
            rich_help_panel=OUTPUT,
            help="JSON-lines file to write.",
        ),
    ]
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=named_path,
            rich_help_panel=TEXT,
            help="JSON-lines file with `prompt` or `messages`, and `tools`; default: 68 that ship.",
        ),
    ] = None
    force: Force = False
    trust_remote_code: TrustRemoteCode = False
    json: Json = False


def traces(out: Model, options: TraceOptions, sampling: SamplingOptions) -> None:
    """Let a model answer prompts, and write the chats with its reasoning.

    A reasoning model spends most tokens on its own words: give them to `--calibration`, and to
    `compare --text`. Prompts are answered in batches; a killed run resumes.

    `quantkit traces gpt-oss-20b-16GB --reasoning low -o traces.jsonl`
    """
    from quantkit.backend import speed_hint
    from quantkit.jobs.traces import TraceSettings, write_traces

    console.note(speed_hint())
    settings = TraceSettings(options.prompts, sampling.parameters())
    with console.Bars() as progress:
        outcome = write_traces(
            out,
            options.output,
            settings,
            force=options.force,
            trust_remote_code=options.trust_remote_code,
            progress=progress,
        )
    if options.json:
        console.print_json({"answered": outcome.answered, "truncated": outcome.truncated})
        return
    cut = f"; {outcome.truncated} were cut off and left out" if outcome.truncated else ""
    print(f"{outcome.answered} answers written to {options.output}{cut}.")
    print(f"Use them: quantkit compare NATIVE OUT --text {options.output}")
