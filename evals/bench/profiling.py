"""The profiler: its memory, and mlx_lm's own beside it.

    python evals/bench/profiling.py memory    some full-shape layers of the 20b, random values
    python evals/bench/profiling.py peer      beside mlx_lm.dynamic_quant's sensitivity pass

Each prints its table and puts it into README.md here. Without a name: all of them.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import machine, peak_gb, run, save
from full_shape import CONFIG_20B, write_checkpoint

from quantkit.backend import mx
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.splits import EVALUATE
from quantkit.checkpoint.source import open_source
from quantkit.demo.build import demo_checkpoint, plain_checkpoint
from quantkit.sensitivity.entries import candidate_entries
from quantkit.sensitivity.exact import measure_entries
from quantkit.sensitivity.fisher import Sweep
from quantkit.sensitivity.validation import spearman
from quantkit.sensitivity.work import ProfileWork
from quantkit.streaming.layer_runner import StreamingModel

LAYERS, TOKENS = 4, 512
PEER_TEXT, OTHER_TEXT = CalibrationSpec(tokens=1024), CalibrationSpec(tokens=4096)


def memory() -> str:
    """Peak memory of a sweep over a few full-shape layers, beside the formula."""
    config = {**CONFIG_20B, "num_hidden_layers": LAYERS}
    config["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "source"
        write_checkpoint(folder, config)
        shutil.copyfile(demo_checkpoint() / "tokenizer.json", folder / "tokenizer.json")
        (Path(name) / "work").mkdir()
        seconds, peak = run([sys.executable, __file__, "sweep", name])
    rows = [f"| measured, 20b shape, {LAYERS} layers, {TOKENS} tokens | {peak:.1f} GB |"]
    for label, experts in (("20b", 32), ("120b", 128)):
        rows.append(f"| formula, {label}, {TOKENS} tokens | {working_set(experts) / 1e9:.1f} GB |")
    return "\n".join(
        [f"{machine()}; {seconds:.0f} s.", "", "| | peak memory |", "|---|---|", *rows]
    )


def working_set(experts: int, tokens: int = TOKENS) -> float:
    """Bytes: a layer's weights in float32, one stack once more in BF16 (2 bytes a value) and packed
    in 3 bits and a half, and what the layer's modules gave on all tokens, in float32."""
    hidden, heads, keys = 2880, 4096, 512
    stack = experts * hidden * hidden
    layer = 4 * (3 * stack + 2 * hidden * heads + 2 * hidden * keys)
    activations = 4 * tokens * (3 * hidden + heads + 2 * keys + 4 * 3 * hidden)
    return layer + (2 + 3.5 / 8) * stack + activations


def sweep(name: str) -> None:
    """What `memory` runs in a process of its own."""
    source = open_source(str(Path(name) / "source"))
    tokens = np.random.default_rng(0).integers(0, 201088, (TOKENS // 256, 256), np.int32)
    entries = candidate_entries(source.inventory.weights, ["q3g64"])
    work = ProfileWork(Path(name) / "work")
    Sweep(StreamingModel(source), tokens, entries, work, 1, 0).run(lambda *_: None)


def peer() -> str:
    """Rank correlation, time and memory of both, for SmolLM2's weights at 4 bits."""
    folder = plain_checkpoint()
    source = open_source(str(folder))
    entries = candidate_entries(source.inventory.weights, ["q4g64"])
    entries = [e for e in entries if e.weight.layer is not None]
    chosen = [entries[i] for i in np.random.default_rng(0).permutation(len(entries))[:48]]
    text = read_calibration_set(source.checkpoint, OTHER_TEXT, EVALUATE)
    truth = measure_entries(StreamingModel(source), mx.array(text.tokens), chosen, lambda _: None)
    real = np.array([truth[e.key].mean() for e in chosen])
    rows = []
    for name in ("quantkit", "mlx_lm.dynamic_quant"):
        done = subprocess.run(
            [sys.executable, __file__, f"scores-{name}"], stdout=subprocess.PIPE, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        guess = np.array([found["scores"][e.weight.name] for e in chosen])
        rows.append(
            f"| {name} | {found['seconds']:.0f} s | {found['peak']:.1f} GB | "
            f"{spearman(guess, real):.3f} |"
        )
    return "\n".join(
        [
            f"{machine()}; SmolLM2-135M, {PEER_TEXT.tokens} tokens, all weights of the layers at "
            f"q4g64, 48 of them measured on {text.text.documents} other documents.",
            "",
            "| | time | peak memory | Spearman |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def scores(name: str) -> None:
    """What `peer` runs in a process of its own: weight -> predicted loss, as JSON."""
    source = open_source(str(plain_checkpoint()))
    tokens = read_calibration_set(source.checkpoint, PEER_TEXT).tokens
    started = time.perf_counter()
    if name == "quantkit":
        entries = candidate_entries(source.inventory.weights, ["q4g64"])
        with tempfile.TemporaryDirectory() as folder:
            work = ProfileWork(Path(folder))
            sweep = Sweep(StreamingModel(source), tokens, entries, work, 1, 0)
            tables = sweep.run(lambda *_: None)
        found = {key[0]: float(v.mean()) for table in tables for key, v in table.costs.items()}
    else:
        from mlx_lm import load
        from mlx_lm.quant.dynamic_quant import estimate_sensitivities

        model, _ = load(str(plain_checkpoint()))
        model.set_dtype(mx.float32)  # products in BF16 do not go through BLAS
        values = estimate_sensitivities(model, mx.array(tokens), 4, 64, 8, 64)
        sizes = {w.name: w.parameters / 1e6 for w in source.inventory.weights}
        found = {name: score * sizes[name] for name, score in values}  # it divides by the size
    peak = peak_gb(resource.getrusage(resource.RUSAGE_SELF))
    print(json.dumps({"scores": found, "seconds": time.perf_counter() - started, "peak": peak}))


PARTS = {"memory": memory, "peer": peer}


def main() -> None:
    """Run the parts that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?")
    parser.add_argument("folder", nargs="?", default="")
    args = parser.parse_args()
    if args.part == "sweep":
        sweep(args.folder)
    elif args.part and args.part.startswith("scores-"):
        scores(args.part.removeprefix("scores-"))
    else:
        for name in [args.part] if args.part else PARTS:
            text = PARTS[name]()
            print(text)
            save(text, f"profile-{name}")


if __name__ == "__main__":
    main()
