"""`quantkit demo`: the main job on a model that fits anywhere."""

import re
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import Json, named_path

_BUDGET = "4.25bpw"
_PROFILED, _QUANTIZED, _COMPARED = 512, 4096, 2048  # tokens: few, to be fast


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            parser=named_path,
            help="Folder to write. Default: in the cache.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", "-b", help=f"Budget, such as 130MB. Default: {_BUDGET}."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Recipe instead of a budget: seconds.")
    ] = None,
    question: Annotated[
        str, typer.Option("--question", "-q", help="Question to the quantized model.")
    ] = "What is the capital of France?",
    json: Json = False,
) -> None:
    """Build a small gpt-oss, quantize it, compare it to its source, and let the result answer.

    The model is SmolLM2-135M-Instruct upcycled to 8 experts in MXFP4, in gpt-oss's published
    layout. It is built once (15 s) and cached ($QUANTKIT_CACHE, else ~/.cache/quantkit). It is
    profiled, quantized to a budget and compared on short texts: a few minutes on a CPU.
    """
    from quantkit.backend import speed_hint
    from quantkit.calibration.calibration_set import CalibrationSpec
    from quantkit.checkpoint.source import open_source
    from quantkit.generation.chat_model import ChatModel, SamplingParameters
    from quantkit.jobs.compare import compare
    from quantkit.jobs.planning import PlanRequest
    from quantkit.jobs.quantize import quantize
    from quantkit.jobs.quantize_options import QuantizeOptions
    from quantkit.storage.paths import cache_folder

    if recipe is None and budget is None:
        budget = _BUDGET
    request = PlanRequest(budget=budget, recipe=recipe)
    request.require_consistent()
    name = re.sub(r"[^\w.]", "-", budget or Path(recipe or "").stem)
    out = output or cache_folder() / f"demo-{name}"
    console.note(speed_hint())
    checkpoint = _build()
    options = QuantizeOptions(
        profile_text=CalibrationSpec(tokens=_PROFILED),
        quantizer_tokens=_QUANTIZED if budget else None,  # recipes round to nearest
        force=output is None,
    )
    with console.Bars() as progress:
        source = open_source(str(checkpoint))
        report = quantize(source, out, request, options, progress=progress).report
        text = CalibrationSpec(tokens=_COMPARED)
        fidelity = compare(source, [str(out)], text, progress=progress)
    deltas = ChatModel(str(out)).answer(
        [{"role": "user", "content": question}], SamplingParameters(64)
    )
    if json:
        answer = "".join(delta.text for delta in deltas)
        console.print_json(
            {
                "report": report.to_json(),
                "fidelity": fidelity[0].to_json(),
                "question": question,
                "answer": answer,
            }
        )
        return
    tables.print_report(report, str(out))
    tables.print_fidelity(fidelity, fidelity[0].text)
    print(f"\n> {question}", flush=True)
    for delta in deltas:
        print(delta.text, end="", flush=True)
    print()


def _build() -> Path:
    """Return the demo checkpoint, built with progress on first use."""
    from quantkit.demo.build import demo_checkpoint

    with console.Bars() as progress:
        stage = progress.stage("Building the demo model", 0)
        return demo_checkpoint(lambda done, total: stage(0, f"layer {done} of {total}"))
