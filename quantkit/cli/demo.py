"""`quantkit demo`: the main job on a model that fits anywhere."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import Json
from quantkit.storage.paths import user_path


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            parser=user_path,
            help="Where to write it. Default: the cache.",
        ),
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe.")] = "mxfp4-q8",
    question: Annotated[
        str, typer.Option("--question", "-q", help="What the quantized model is asked.")
    ] = "What is the capital of France?",
    json: Json = False,
) -> None:
    """Build a small gpt-oss, quantize it, print the report, and let the result answer.

    The model is SmolLM2-135M-Instruct upcycled to 8 experts in MXFP4, in gpt-oss's published
    layout; it is built once (15 s) and kept in the cache ($QUANTKIT_CACHE, else ~/.cache/quantkit).
    """
    from quantkit.backend import speed_hint
    from quantkit.checkpoint.source import open_source
    from quantkit.cli.choose import Asked, choose_plan
    from quantkit.demo.build import demo_checkpoint
    from quantkit.generation.chat_model import ChatModel, SamplingParameters
    from quantkit.jobs.pipeline import quantize
    from quantkit.storage.paths import cache_folder

    console.note(speed_hint())
    with console.progress(0, "Building the demo model,") as progress:
        checkpoint = demo_checkpoint(lambda done, of: progress(0, f"layer {done} of {of}"))
    source = open_source(str(checkpoint))
    plan = choose_plan(source, Asked(recipe=recipe))
    out = output or cache_folder() / f"demo-{Path(recipe).stem}"
    with console.progress(plan.total_bytes, f"Writing {out.name}") as progress:
        report = quantize(source, plan, out, force=output is None, progress=progress)
    deltas = ChatModel(str(out)).answer(
        [{"role": "user", "content": question}], SamplingParameters(64)
    )
    if json:
        said = "".join(delta.text for delta in deltas)
        console.print_json({"report": report.to_json(), "question": question, "answer": said})
        return
    tables.print_report(report, str(out))
    print(f"\n> {question}", flush=True)
    for delta in deltas:
        print(delta.text, end="", flush=True)
    print()
