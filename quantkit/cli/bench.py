"""`quantkit bench`: the speed and memory of a repo."""

from typing import Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import Json, Record, Repo, TrustRemoteCode


def bench(
    out: Repo,
    context: Annotated[
        str, typer.Option(help="Prompt lengths in tokens, such as 1k,4k.")
    ] = "1k,4k",
    tokens: Annotated[
        int, typer.Option(min=16, help="Tokens to generate after each prompt.")
    ] = 128,
    trust_remote_code: TrustRemoteCode = False,
    record: Record = False,
    json: Json = False,
) -> None:
    """Measure peak memory, prefill and generation speed with stock mlx-lm.

    The model is loaded whole. The computed memory of weights and KV cache stands beside the peak.

    `quantkit bench gpt-oss-20b-16GB --context 1k,8k`
    """
    from quantkit.backend import speed_hint
    from quantkit.errors import in_field
    from quantkit.evaluation.speed import measure
    from quantkit.publish.record import read_report
    from quantkit.units import parse_count

    report = read_report(out)
    with in_field("context"):
        contexts = [parse_count(text) for text in context.split(",")]
    console.note(speed_hint())
    with console.Bars() as bars:
        stage = bars.stage("Generating", len(contexts) * tokens, "tokens")
        speed = measure(out, report, contexts, tokens, stage, trust_remote_code=trust_remote_code)
    if json:
        console.print_json(speed.to_json())
    else:
        tables.print_speed(speed, str(out))
    if record:
        console.record(out, speed=speed)
