"""`quantkit bench`: how fast a repo is, and in how much memory."""

from typing import Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import Json, Record, Repo, TrustRemoteCode


def bench(
    out: Repo,
    context: Annotated[
        str, typer.Option(help="Lengths of the prompts in tokens, such as 1k,4k.")
    ] = "1k,4k",
    tokens: Annotated[int, typer.Option(min=16, help="How many to generate after each.")] = 128,
    trust_remote_code: TrustRemoteCode = False,
    record: Record = False,
    json: Json = False,
) -> None:
    """Measure peak memory, prefill and generation speed, through mlx-lm's own generation.

    The model is loaded whole, as its users do. Beside the peak stands what was computed: weights
    and KV cache. `--record` puts the figures into OUT's quantkit.json and model card.
    """
    from quantkit.backend import speed_hint
    from quantkit.evaluation.speed import measure
    from quantkit.publish.report import read_report
    from quantkit.units import parse_count

    report = read_report(out)
    contexts = [parse_count(text) for text in context.split(",")]
    console.note(speed_hint())
    with console.progress(len(contexts) * tokens, "Generating", "tokens") as progress:
        speed = measure(
            out, report, contexts, tokens, progress, trust_remote_code=trust_remote_code
        )
    if json:
        console.print_json(speed.to_json())
    else:
        tables.print_speed(speed, str(out))
    if record:
        console.record(out, speed=speed)
