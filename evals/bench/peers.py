"""Calibrated quantizers side by side: quantkit, mlx-lm's four, mlx-optiq and AutoRound.

    python evals/bench/peers.py [FOLDER [ROW ...]] [--made] [--gemma]

The repos and what they took are kept in FOLDER, where a killed run goes on; with numbers of rows,
only these are made, and the table is not. --made tables the rows that are made.

On plain SmolLM2-135M in BF16, or with --gemma on Gemma 3 270M (gemma.py). Each tool runs in its own
process, by its own main(), in float32 (BLAS on a CPU has no BF16 products), and stores BF16;
mlx-lm's read quantkit's text, mlx-optiq its own.
quantkit gets the bytes of mlx_lm.gptq. All repos are compared to the native model on documents that
calibrated nothing. mlx-optiq is installed beside the others, without what it only serves with,
AutoRound in an environment of its own; it leaves the embedding in BF16, which is then rounded to
nearest.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import numpy as np
from _common import machine, run, save
from gemma import gemma_checkpoint
from tokenizers import Tokenizer

from quantkit.backend import mx  # before mlx's other modules: see backend
from quantkit.backend.cpu_functions import speed_up_mlx
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.splits import CALIBRATE, VALIDATE
from quantkit.checkpoint.source import open_source
from quantkit.demo.build import plain_checkpoint
from quantkit.jobs.compare import compare

MODEL = "PEERS_MODEL"  # environment variable: the checkpoint, for the processes of the tools
PROFILED, QUANTIZED = 4096, 16384  # tokens
TUNED = 60  # steps of 1,024 tokens, ours and those of mlx_lm.dwq
OPTIQ, AUTO_ROUND = "mlx-optiq==0.7.7", "auto-round==0.16.1"
ROUNDED_LENGTH = 240  # tokens of AutoRound's sequences: decoded ones may lose a few of 256
FOUR_BITS = ["--bits", "4", "--group-size", "64"]
TRIPLE = ("weight", "scales", "biases")
DWQ = [*FOUR_BITS, "--num-samples", str(4 * TUNED), "--max-seq-length", "257"]
PEERS = (
    ("mlx_lm.convert", ["-q", "--q-bits", "4", "--q-group-size", "64"]),
    ("mlx_lm.gptq", [*FOUR_BITS, "--fallback-bits", "4", "--fallback-group-size", "64"]),
    ("mlx_lm.awq", [*FOUR_BITS, "--embed-bits", "4", "--embed-group-size", "64"]),
    ("mlx_lm.dynamic_quant", ["--target-bpw", "4.5", "--low-bits", "3", "--high-bits", "5"]),
    ("mlx_lm.dwq", [*DWQ, "--learning-rate", "1e-6"]),
    ("mlx_lm.dwq", [*DWQ, "--learning-rate", "1e-5"]),
    ("optiq convert", ["--target-bpw", "4.5", "--candidate-bits", "3,4,8", "--n-calibration", "4"]),
    ("auto-round", ["--bits", "4", "--group_size", "64", "--asym", "--format", "mlx"]),
)


def checkpoint() -> str:
    """The folder of the model."""
    return os.environ.get(MODEL) or str(plain_checkpoint())


def peer(name: str, out: str, options: list[str]) -> None:
    """Run another tool in this process."""
    if tool := {"optiq convert": optiq, "auto-round": auto_round}.get(name):
        tool(out, options)
        return
    if name == "mlx_lm.convert":
        from mlx_lm.convert import main as entry
    else:
        entry = prepared(name)
    os.chdir(Path(out).parent)  # where dynamic_quant leaves its sensitivities
    sys.argv = [name, "--model", checkpoint(), "--mlx-path", out, *options]
    entry()


def optiq(out: str, options: list[str]) -> None:
    """Run mlx-optiq, whose sensitivities are then computed in float32.

    It measures every weight in every tier by the whole model: with mlx's exponentials of a CPU that
    would take two hours. It hands its plan to mlx-lm by position, where mlx-lm 0.32.2 has another
    argument: unmended, all weights get 4 bits.
    """
    sys.path.append(os.environ["OPTIQ"])
    from optiq.cli import convert
    from optiq.core import sensitivity
    from optiq.models import llm

    speed_up_mlx()
    sensitivity._kl_from_ref = mean_kl
    converter = import_module("mlx_lm.convert")
    quantize = converter.quantize_model

    def quantize_by_plan(model, config, group_size, bits, mode, quant_predicate):
        options = {"mode": mode, "quant_predicate": quant_predicate}
        return quantize(model, config, group_size, bits, **options)

    converter.quantize_model = quantize_by_plan

    analyze = llm.analyze_sensitivity_exact

    def analyze_float32(model, *args, **kwargs):
        model.set_dtype(mx.float32)
        return analyze(model, *args, **kwargs)

    llm.analyze_sensitivity_exact = analyze_float32
    work = f"{out}-work"
    convert.main([checkpoint(), "-o", work, "--skip-baselines", *options], "optiq", None, False)
    Path(work, "optiq_mixed").rename(out)


def mean_kl(logits: mx.array, reference: mx.array) -> mx.array:
    """mlx-optiq's KL(reference || logits), by numpy's exponentials."""
    logs = [np.array(z.astype(mx.float32)) for z in (logits, reference)]
    for z in logs:
        z -= z.max(axis=-1, keepdims=True)
        z -= np.log(np.exp(z).sum(axis=-1, keepdims=True))
    other, native = logs
    return mx.array((np.exp(native) * (native - other)).sum(axis=-1).mean())


def auto_round(out: str, options: list[str]) -> None:
    """Run AutoRound in its own environment, and round the embedding to nearest."""
    text, made = Path(f"{out}.jsonl"), Path(f"{out}-made")
    tokenizer = Tokenizer.from_file(f"{checkpoint()}/tokenizer.json")
    rows = calibrate_text(QUANTIZED)
    lines = [
        json.dumps({"text": tokenizer.decode(list(row), skip_special_tokens=False)}) for row in rows
    ]
    text.write_text("\n".join(lines))
    command = [f"{os.environ['AUTO_ROUND']}/bin/auto-round", "--model", checkpoint()]
    command += ["--dataset", str(text), "--output_dir", str(made), "--disable_amp"]
    command += ["--nsamples", str(len(rows)), "--seqlen", str(ROUNDED_LENGTH)]
    subprocess.run([*command, *options], check=True)
    (folder,) = made.iterdir()
    tensors, config = mx.load(f"{folder}/model.safetensors"), folder / "config.json"
    name = "model.embed_tokens"
    packed = mx.quantize(tensors[f"{name}.weight"], 64, 4)
    tensors |= {f"{name}.{part}": x for part, x in zip(TRIPLE, packed, strict=True)}
    mx.save_safetensors(f"{folder}/model.safetensors", tensors, {"format": "mlx"})
    settings = json.loads(config.read_text())
    settings["quantization"].pop(name)
    config.write_text(json.dumps(settings))
    folder.rename(out)


def calibrate_text(count: int, split: str = CALIBRATE) -> np.ndarray:
    """Tokens (sequences, length) of quantkit's text."""
    opened = open_source(checkpoint()).checkpoint
    return read_calibration_set(opened, CalibrationSpec(tokens=count), split).tokens


def quantized_linear(layer, x):
    """What QuantizedLinear computes, with a product that BLAS knows."""
    return x @ weight_of(layer).T + layer.get("bias", 0)


def weight_of(layer):
    """The values of a quantized layer."""
    parts = (layer["weight"], layer["scales"], layer["biases"])
    return mx.dequantize(*parts, layer.group_size, layer.bits)


def prepare_dwq(module) -> None:
    """Let mlx_lm.dwq read our text, and train in float32 on products that BLAS knows."""
    from mlx import nn

    nn.QuantizedLinear.__call__ = quantized_linear
    nn.QuantizedEmbedding.as_linear = lambda layer, x: x @ weight_of(layer).T
    train = calibrate_text(1024 * TUNED)
    valid = calibrate_text(PROFILED, VALIDATE)
    # Its targets are the next tokens, so that a sequence of 257 would have 256 of them.
    texts = [[(row.tolist(), 0) for row in rows] for rows in (train, valid)]
    module.load_data = lambda *_, **__: texts
    quantize = module.dwq_quantize
    module.dwq_quantize = lambda *args, **kwargs: quantize(*args, **kwargs, dtype=mx.float32)


def prepared(name: str):
    """The main() of a tool that reads our text, computes in float32 and stores BF16."""
    module = import_module(f"mlx_lm.quant.{name.rpartition('.')[2]}")
    load, store = module.load, module.save

    def load_float32(*args, **kwargs):
        model, *rest = load(*args, **kwargs)
        model.set_dtype(mx.float32)
        return (model, *rest)

    def save_bf16(path, source, model, *rest):
        model.set_dtype(mx.bfloat16)
        store(path, source, model, *rest)

    module.load, module.save = load_float32, save_bf16
    if name == "mlx_lm.dynamic_quant":
        estimate = module.estimate_threshold

        def estimate_bf16(model, *args, **kwargs):
            model.set_dtype(mx.bfloat16)  # it counts the bits of scales and biases as they are
            return estimate(model, *args, **kwargs)

        module.estimate_threshold = estimate_bf16
    if name == "mlx_lm.dwq":
        prepare_dwq(module)
    else:
        tokens = calibrate_text(QUANTIZED if name == "mlx_lm.gptq" else PROFILED)
        module.load_data = lambda *_, **__: mx.array(tokens)
    return module.main


def rows() -> list[tuple[str, list[str]]]:
    """Labels and commands, without their output folders. The budget of the last is that of gptq."""
    script = [sys.executable, __file__, "peer"]
    peers = [(" ".join([name, *options]), [*script, name, *options]) for name, options in PEERS]
    quantkit = [sys.executable, "-m", "quantkit", "quantize", checkpoint()]
    ours = [
        ("quantkit", ["--quantizer-tokens", str(QUANTIZED)]),
        (
            f"quantkit --tune {TUNED}",
            ["--quantizer-tokens", str(QUANTIZED), "--tune", str(TUNED)],
        ),
    ]
    return peers + [(label, [*quantkit, *options]) for label, options in ours]


def make(folder: Path, number: int) -> None:
    """Make the repo of a row in `folder`, and note its time and memory; a finished one stays."""
    label, command = rows()[number]
    out, note = folder / str(number), folder / f"{number}.json"
    if note.exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    if "quantkit" in command:
        profile = folder / "profile"
        profiled = [sys.executable, "-m", "quantkit", "profile", checkpoint(), "-o", str(profile)]
        measured(profiled, folder / "profile.json")
        command = [*command, "--profile", str(profile), "--budget", f"like:{folder / '1'}"]
        command += ["-o", str(out)]
    else:
        os.environ["OPTIQ"] = str(folder / "optiq")
        if PEERS[number][0] == "optiq convert" and not (folder / "optiq").exists():
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
            run([*pip, os.environ["OPTIQ"], OPTIQ])
        os.environ["AUTO_ROUND"] = str(folder / "auto-round")
        if PEERS[number][0] == "auto-round" and not (folder / "auto-round").exists():
            run([sys.executable, "-m", "venv", os.environ["AUTO_ROUND"]])
            run([f"{folder}/auto-round/bin/python", "-m", "pip", "install", "-q", AUTO_ROUND])
        command = [*command[:4], str(out), *command[4:]]
    print(label, *measured(command, note), flush=True)


def measured(command: list[str], note: Path) -> tuple[float, float]:
    """The seconds and the peak memory (GB) of a command, run unless they are noted."""
    if not note.exists():
        note.write_text(json.dumps(run(command)))
    seconds, peak = json.loads(note.read_text())
    return seconds, peak


def table(folder: Path, numbers: list[int]) -> str:
    """What these rows took, and their KL divergence."""
    source = open_source(checkpoint())
    for number in numbers:
        make(folder, number)
    found = compare(source, [str(folder / str(number)) for number in numbers])
    profile = measured([], folder / "profile.json")
    lines = []
    for number, result in zip(numbers, found, strict=True):
        label, command = rows()[number]
        seconds, peak = measured([], folder / f"{number}.json")
        if "quantkit" in command:
            seconds, peak = seconds + profile[0], max(peak, profile[1])
        kl = result.kl_mean
        lines.append(
            f"| {label} | {result.bits_per_weight:.3f} | {kl.value:.4f} ({kl.low:.4f} to "
            f"{kl.high:.4f}) | {kl.value / found[0].kl_mean.value:.3f} | "
            f"{100 * result.top1_agreement.value:.1f}% | {seconds:.0f} s | {peak:.1f} GB |"
        )
    return "\n".join(
        [
            f"{machine()}; {Path(checkpoint()).name}; {QUANTIZED:,} tokens for gptq, theirs and "
            f"ours, {PROFILED:,} for awq and dynamic_quant, "
            f"{CalibrationSpec().tokens:,} for our profile, "
            f"{1024 * TUNED:,} to train on, 2,048 of its own for optiq, {ROUNDED_LENGTH} of each "
            f"256 of gptq's for AutoRound; evaluated on "
            f"{found[0].tokens:,} tokens of {found[0].documents} other documents. quantkit's times "
            "include its profile.",
            "",
            "| | bpw | KL mean | ratio | top-1 | time | peak memory |",
            "|---|---|---|---|---|---|---|",
            *lines,
        ]
    )


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*")
    args, options = parser.parse_known_args()
    if args.what[:1] == ["peer"]:
        peer(args.what[1], args.what[2], options)
        return
    made, gemma = "--made" in options, "--gemma" in options
    with tempfile.TemporaryDirectory() as temporary:
        folder, *numbers = args.what or [temporary]
        Path(folder).mkdir(exist_ok=True)
        if gemma:
            os.environ[MODEL] = str(gemma_checkpoint(Path(folder).resolve()))
        for number in numbers:
            make(Path(folder).resolve(), int(number))
        if not numbers:
            every = range(len(rows()))
            wanted = [n for n in every if not made or (Path(folder) / f"{n}.json").exists()]
            save(table(Path(folder).resolve(), wanted), "peers-gemma" if gemma else "peers")


if __name__ == "__main__":
    main()
