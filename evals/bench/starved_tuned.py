"""Scale tuning when experts see few tokens, as those of gpt-oss do.

    python evals/bench/starved_tuned.py [CAP ...]

On the demo model, the experts of every third layer in q3g64, other weights native: gptq on a capped
part of their inputs (see starved.py), then 60 steps of scale tuning. Tuning starves, too: its text
is so short that an expert sees as many inputs per dimension as in gpt-oss in 60 steps of 1,024
tokens, 2.7 in the 20b (cap 0.71) and 0.67 in the 120b (cap 0.18). Steps read it again and again.
The table goes into README.md here.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _common import machine, save
from starved import EVALUATED, TOKENS, VALIDATED, Variant, recorded, spelled, stacks_of

from quantkit.backend import mx
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.splits import CALIBRATE, EVALUATE, VALIDATE
from quantkit.checkpoint.source import open_source
from quantkit.demo.build import demo_checkpoint
from quantkit.evaluation.intervals import DocumentBootstrap
from quantkit.formats.codec import encode, to_mx, to_numpy
from quantkit.formats.tiers import parse_tier
from quantkit.progress import silent
from quantkit.quantizers.layer_files import EMBEDDING, LayerFiles
from quantkit.quantizers.matrix import scales_dtype
from quantkit.quantizers.scale_tuning import ScaleTuner, Tuning, TuningText
from quantkit.storage.work_dir import Tensors, WorkDirectory
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import hooked
from quantkit.streaming.lm_head import ChangedModel, divergence
from quantkit.streaming.products import packed_product
from quantkit.streaming.weight_loader import Call

TIER = parse_tier("q3g64")
STEPS = 60
TUNED_TOKENS = {0.71: 3072, 0.18: 768}  # of the demo: 2.7 and 0.67 inputs per dimension
Packed = dict[str, tuple[mx.array, ...]]


def quantize(
    model: StreamingModel, cap: float, texts: dict[str, mx.array], files: LayerFiles
) -> None:
    """Quantize the experts by gptq on capped inputs, and save their tensors."""
    streams = {split: model.calls(tokens)[0].x for split, tokens in texts.items()}
    calls = model.calls(texts[VALIDATE][:1])
    for stage in (EMBEDDING, len(model.layers)):
        files.save(stage, {})
    for number, layer in enumerate(model.layers):
        names = [name for name in model.weights if name.startswith(f"{layer.path}.")]
        chosen = stacks_of(model, number)
        with hooked(layer, names) as module:
            text = recorded(model, module, TIER, calls[number], streams)
            weights = text.quantize(chosen, Variant("gptq", cap, None)) if chosen else {}
        tensors: dict[str, Tensors] = {}
        for name, weight in weights.items():
            packed, *scales = weight.packed(TIER)
            dtype = scales_dtype(model.weights[name])
            tensors[name] = (to_numpy(packed), *(to_numpy(x.astype(dtype)) for x in scales))
        files.save(number, tensors)
        print(f"cap {cap:g}, layer {number}", flush=True)


def outputs(model: StreamingModel, tokens: mx.array, packed: Callable[[int], Packed]) -> mx.array:
    """The last layer's output (sequences, length, hidden), with `packed` tensors by layer."""
    x = model.calls(tokens)[0].x
    for number, dry in enumerate(model.calls(tokens[:1])):
        products = {name: packed_product(tensors, TIER) for name, tensors in packed(number).items()}
        with hooked(model.layers[number], list(products)) as module:
            outs = []
            for batch in Call(x, dry.args, dry.kwargs).batches():
                outs.append(module.run_with(batch, products))
                mx.eval(outs[-1])
        x = mx.concatenate(outs)
    return x


def row(model: StreamingModel, cap: float) -> str:
    """The row of one cap."""

    def read(count: int, split: str):
        return read_calibration_set(model.source.checkpoint, CalibrationSpec(tokens=count), split)

    def loaded(stored: Callable[[int], dict[str, Tensors]]) -> Callable[[int], Packed]:
        return lambda number: {
            name: (mx.array(packed), *(to_mx(x, model.weights[name].dtype) for x in scales))
            for name, (packed, *scales) in stored(number).items()
        }

    validation, evaluated = read(VALIDATED, VALIDATE).tokens, read(EVALUATED, EVALUATE)
    texts = {CALIBRATE: mx.array(read(TOKENS, CALIBRATE).tokens), VALIDATE: mx.array(validation)}
    tiers = {n: TIER for number in range(len(model.layers)) for n in stacks_of(model, number)}
    count = TUNED_TOKENS[cap]
    with tempfile.TemporaryDirectory() as folder:
        files = LayerFiles(WorkDirectory(Path(folder)))
        quantize(model, cap, texts, files)
        text = TuningText(read(count, CALIBRATE).tokens, validation)
        tuner = ScaleTuner(model, tiers, files, Tuning(STEPS, min(count, 1024)), text, silent)
        tuner.run()
        tokens = mx.array(evaluated.tokens)
        native = model.run(tokens, lambda *_: None)
        ways = (
            lambda number: {n: encode(model.values(n), TIER) for n in stacks_of(model, number)},
            loaded(files.load),
            loaded(tuner.tensors),
        )
        changed = [ChangedModel(outputs(model, tokens, way)) for way in ways]
    found = [np.array(kl).reshape(-1) for kl in divergence(model, native, changed)]
    drawn = DocumentBootstrap.draw(np.random.default_rng(0), evaluated.documents)
    rtn, gptq, tuned = found
    means = " | ".join(f"{drawn.mean(kl).value:.4f}" for kl in found)
    ratios = " | ".join(
        spelled(drawn.ratio(*pair)) for pair in ((gptq, rtn), (tuned, rtn), (tuned, gptq))
    )
    return f"| {cap:g} | {count:,} | {means} | {ratios} |"


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = list(TUNED_TOKENS)
    parser.add_argument("caps", nargs="*", type=float, choices=choices, metavar="CAP")
    caps = parser.parse_args().caps or choices
    model = StreamingModel(open_source(str(demo_checkpoint())))
    rows = []
    for cap in caps:
        rows.append(row(model, cap))
        print(rows[-1], flush=True)
    text = "\n".join(
        [
            f"{machine()}; q3g64; {STEPS} steps of tuning, evaluated on {EVALUATED:,} tokens of "
            "other documents.",
            "",
            "| inputs / width | tokens to tune on | rtn | gptq | tuned | gptq over rtn "
            "| tuned over rtn | tuned over gptq |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )
    if caps == choices:
        save(text, "starved-tuned")
    else:
        print(text)


if __name__ == "__main__":
    main()
