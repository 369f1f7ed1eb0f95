"""`quantkit quantize`: the main job."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.command_line import command_line
from quantkit.cli.options import (
    OUTPUT,
    QUANTIZER,
    TEXT,
    Force,
    Json,
    Memory,
    SourceOptions,
    Src,
    Text,
    TierOptions,
    Tokens,
    memory_bytes,
    named_path,
)


@dataclass(frozen=True)
class WriteOptions:
    """How to quantize, and where to write."""

    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            parser=named_path,
            rich_help_panel=OUTPUT,
            help="Folder to write.",
        ),
    ]
    calibration: Text = "default"
    tokens: Tokens = 1536
    quantizer_tokens: Annotated[
        str,
        typer.Option(
            metavar="N",
            rich_help_panel=TEXT,
            help="Tokens of text for search and gptq; auto: 4 per expert and input dimension.",
        ),
    ] = "auto"
    tune: Annotated[
        int,
        typer.Option(
            metavar="STEPS",
            min=0,
            rich_help_panel=QUANTIZER,
            help="Tune scales and biases by the KL divergence after search or gptq, in steps of "
            "1,024 tokens; 60 are worth their time.",
        ),
    ] = 0
    imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=named_path,
            rich_help_panel=QUANTIZER,
            help="Importance matrix of llama.cpp (GGUF), in place of text for search: no pass of "
            "the model is needed.",
        ),
    ] = None
    shard_size: Annotated[
        str, typer.Option(rich_help_panel=OUTPUT, help="Largest shard, such as 5GB or 4GiB.")
    ] = "5GB"
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME",
            rich_help_panel=OUTPUT,
            help="Hub id of the base model for the card, if SRC is a local folder.",
        ),
    ] = None
    force: Force = False
    memory: Memory = None


def quantize(
    ctx: typer.Context,
    src: Src,
    tiers: TierOptions,
    writing: WriteOptions,
    opening: SourceOptions,
    json: Json = False,
) -> None:
    """Quantize a checkpoint to a repo that stock mlx-lm loads.

    `--budget` chooses the tiers of least KL divergence, by `--profile`, or by a profile in
    OUT-profile, which is made first if it is missing. The checkpoint is streamed: gptq needs the
    memory of one layer and its inputs. A killed run resumes when the same command runs again.

    `quantkit quantize openai/gpt-oss-20b --budget mac:16GB -o gpt-oss-20b-16GB`
    """
    from quantkit.backend import speed_hint
    from quantkit.backend.memory_limits import limited_memory
    from quantkit.calibration.calibration_set import CalibrationSpec
    from quantkit.errors import in_field
    from quantkit.jobs.quantize import quantize as run
    from quantkit.jobs.quantize_options import QuantizeOptions, check_request
    from quantkit.units import parse_bytes

    with in_field("shard_size"):
        shard_bytes = parse_bytes(writing.shard_size)
    options = QuantizeOptions(
        profile_text=CalibrationSpec(writing.calibration, writing.tokens),
        quantizer_text=CalibrationSpec(writing.calibration),
        quantizer_tokens=_count(writing.quantizer_tokens),
        tuning_steps=writing.tune,
        imatrix=writing.imatrix,
        shard_bytes=shard_bytes,
        command=command_line(ctx),
        base_model=writing.base_model,
        force=writing.force,
    )
    request = tiers.request()
    check_request(writing.output, request, options)
    console.note(speed_hint())
    with console.Bars() as progress, limited_memory(memory_bytes(writing.memory)):
        outcome = run(opening.open(src), writing.output, request, options, progress=progress)
    if json:
        console.print_json(outcome.report.to_json())
        return
    tables.print_report(outcome.report, str(writing.output))
    if outcome.complete:
        print("It was complete already; nothing was written.")
        return
    if outcome.resumed:
        print("Resumed an interrupted run.")
    print(f"Written. Check it with: quantkit verify {writing.output}")


def _count(text: str) -> int | None:
    """Parse `--quantizer-tokens`. Raises InputError."""
    from quantkit.errors import InputError

    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(f"`quantizer_tokens` {text!r}: write a number, or auto.") from None
