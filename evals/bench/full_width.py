"""One layer of gpt-oss's real width: time and peak memory of the profile and of gptq.

    python evals/bench/full_width.py 20b    the whole layer: 32 experts of 2880 x 2880
    python evals/bench/full_width.py 120b   experts that are factored at once, of 128

Weights have a falling spectrum and noise, embeddings correlated channels and a few massive ones,
routers uneven loads; tokens follow Zipf's law. A process of its own runs each measurement. The
table, with the operations counted and extrapolated to all layers, goes into README.md here.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from _common import machine, run, save
from full_shape import CONFIG_20B

from quantkit.artifacts.plan import Plan
from quantkit.backend import mx
from quantkit.checkpoint.gpt_oss import stored_tensors
from quantkit.checkpoint.source import Source, open_source
from quantkit.formats import mxfp4
from quantkit.formats.files import header_bytes
from quantkit.formats.tiers import NATIVE, TensorSpec, parse_tier
from quantkit.planning.plan import make_plan
from quantkit.progress import silent
from quantkit.quantizers.hessians import Hessians
from quantkit.quantizers.input_sums import DiskSpool, Inputs, InputSums
from quantkit.quantizers.layer_files import LayerFiles
from quantkit.quantizers.layerwise import LayerwiseQuantizer
from quantkit.quantizers.matrix import quantize_rows
from quantkit.quantizers.registry import find_quantizer
from quantkit.sensitivity.entries import default_entries
from quantkit.sensitivity.fisher import Sweep
from quantkit.sensitivity.work import ProfileWork
from quantkit.storage.work_dir import WorkDirectory
from quantkit.streaming.layer_runner import StreamingModel

WIDTH, VOCABULARY, LENGTH = 2880, 16384, 256
LAYERS = {"120b": 36, "20b": 24}
EXPERTS = {"120b": 128, "20b": 32}
TOKENS = {"20b": (16384, 131072), "120b": (119808,)}  # the last: all of the shipped text
PROFILE_TOKENS, VALIDATED = 4096, 16384
RANK = 256


def config(experts: int) -> dict[str, object]:
    """The settings of two layers, since mlx-lm wants both kinds of attention."""
    return {
        **CONFIG_20B,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": experts,
        "vocab_size": VOCABULARY,
    }


def matrix(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Values whose singular values fall like 1 / sqrt(k), beside noise."""
    spectrum = np.arange(1, RANK + 1, dtype=np.float32) ** -0.5
    left = rng.standard_normal((rows, RANK), np.float32) * spectrum
    low_rank = left @ rng.standard_normal((RANK, columns), np.float32)
    noise = rng.standard_normal((rows, columns), np.float32)
    return 0.02 * (low_rank / low_rank.std() + noise)


def embeddings(rng: np.random.Generator) -> np.ndarray:
    """Rows with correlated channels, five of them massive."""
    rows = matrix(rng, VOCABULARY, WIDTH)
    rows[:, rng.integers(0, WIDTH, 5)] *= 20
    return rows


def values(
    spec: TensorSpec, rng: np.random.Generator, waiting: dict[str, bytes]
) -> Iterator[bytes]:
    """Yield the bytes of a tensor; the scales of packed experts wait for their turn."""
    name, shape = spec.name, spec.shape
    if name.endswith("_blocks"):
        scales = []
        for _ in range(shape[0]):
            packed, scale = mxfp4.encode(matrix(rng, shape[1], shape[2] * 32))
            scales.append(np.asarray(scale).tobytes())
            yield packed.view(np.uint8).tobytes()
        waiting[name.replace("_blocks", "_scales")] = b"".join(scales)
    elif name.endswith("_scales"):
        yield waiting.pop(name)
    else:
        yield to_bf16(plain(name, shape, rng)).tobytes()


def plain(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A matrix, norm or bias."""
    if "norm" in name:
        return np.ones(shape, np.float32)
    if "router.weight" in name:
        return 1.5 / WIDTH**0.5 * rng.standard_normal(shape, np.float32)
    if "router.bias" in name:
        return 0.5 * rng.standard_normal(shape, np.float32)
    if "embed" in name or "lm_head" in name:
        return embeddings(rng)
    if len(shape) == 2 and "experts" not in name:
        return matrix(rng, *shape)
    return np.zeros(shape, np.float32)


def to_bf16(array: np.ndarray) -> np.ndarray:
    """BF16 as the upper half of float32."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write(folder: Path, experts: int) -> None:
    """Write the checkpoint of two layers."""
    folder.mkdir()
    rng, waiting = np.random.default_rng(0), {}
    specs = list(stored_tensors(config(experts)))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header_bytes(specs, "pt"))
        for spec in specs:
            for data in values(spec, rng, waiting):
                file.write(data)
    (folder / "config.json").write_text(json.dumps(config(experts)))


def zipf(tokens: int, seed: int) -> np.ndarray:
    """Token ids (sequences, length) that follow Zipf's law."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, VOCABULARY + 1)
    ids = rng.choice(VOCABULARY, (tokens // LENGTH, LENGTH), p=share / share.sum())
    return ids.astype(np.int32)


def layer_plan(source: Source) -> Plan:
    """Experts in 3 bits, attention in 6, all else native."""
    tiers = {
        w.name: parse_tier("q3g64" if len(w.shape) > 2 else "q6g64") if w.layer == 0 else NATIVE
        for w in source.inventory.weights
    }
    tiers |= {w.name: NATIVE for w in source.inventory.weights if w.role == "router"}
    return replace(make_plan(source.inventory, tiers, "one layer"), quantizer="gptq")


def gptq(folder: Path, tokens: int) -> dict[str, float]:
    """Quantize the first layer; return seconds, and inputs per dimension of the poorest stack."""
    source = open_source(str(folder / "source"))
    work = folder / f"work-{tokens}"
    work.mkdir()
    text = mx.array(np.concatenate([zipf(tokens, 1), zipf(min(tokens // 4, VALIDATED), 2)]))
    files = LayerFiles(WorkDirectory(work))
    start = time.perf_counter()
    quantizer = LayerwiseQuantizer(
        StreamingModel(source), layer_plan(source), text, tokens // LENGTH, files, silent
    )
    quantizer.load(0)
    seconds = time.perf_counter() - start
    poorest = min(row.median / row.width for row in quantizer.expert_inputs().values())
    return {"seconds": seconds, "fed": poorest}


def profile(folder: Path, tokens: int) -> dict[str, float]:
    """Profile both layers in the default tiers; return seconds and entries of one."""
    source = open_source(str(folder / "source"))
    work = folder / "profile"
    work.mkdir()
    entries = [
        entry
        for entry in default_entries(source.inventory.weights)
        if entry.weight.layer is not None
    ]
    start = time.perf_counter()
    sweep = Sweep(StreamingModel(source), zipf(tokens, 3), entries, ProfileWork(work), 2, 0)
    sweep.run(lambda *_: None)
    return {"profile": (time.perf_counter() - start) / 2, "entries": len(entries) / 2}


def batch(folder: Path, tokens: int) -> dict[str, float]:
    """One batch of the experts of the 120b: inputs on disk, Hessians, gptq of one stack."""
    rng, experts = np.random.default_rng(0), EXPERTS["120b"]
    root = matrix(rng, WIDTH, WIDTH)
    sums = InputSums(experts, DiskSpool(folder / "inputs.f32"))
    load = np.exp(0.5 * rng.standard_normal(experts))
    added = 0.0
    for first in range(0, tokens, 4096):
        count = 4 * min(4096, tokens - first)
        x = mx.array(rng.standard_normal((count, WIDTH), np.float32)) @ mx.array(root)
        mx.eval(x)
        chosen = rng.choice(experts, count, p=load / load.sum())
        start = time.perf_counter()
        sums.add(Inputs(x, chosen))
        added += time.perf_counter() - start
    read = time.perf_counter()
    some, moments = next(sums.moments())
    summed = time.perf_counter()
    weights = mx.array(np.stack([matrix(rng, WIDTH, WIDTH) for _ in range(some.stop)]))
    made = time.perf_counter()
    quantizer = find_quantizer("gptq")
    quantize_rows(weights, Hessians(moments), parse_tier("q3g64"), quantizer, mx.bfloat16)
    return {
        "inputs": added,
        "hessians": summed - read,
        "quantizing": time.perf_counter() - made,
        "experts": some.stop,
        "fed": float(np.median(sums.counts)) / WIDTH,
    }


PARTS = {"gptq": gptq, "profile": profile, "batch": batch}


def measured(folder: Path, part: str, tokens: int) -> dict[str, float]:
    """Run a part in a process of its own; return its numbers, and its peak memory in GB."""
    _, peak = run([sys.executable, __file__, "part", str(folder), part, str(tokens)])
    found = json.loads((folder / f"{part}.json").read_text())
    print(part, found, f"{peak:.1f} GB", flush=True)
    return {**found, "peak": peak}


def rows(model: str, folder: Path) -> Iterator[str]:
    """Measure, and yield the rows of the table."""
    layers = LAYERS[model]
    if model == "20b":
        write(folder / "source", EXPERTS[model])
        for tokens in TOKENS[model]:
            made = measured(folder, "gptq", tokens)
            seconds = made["seconds"]
            yield (
                f"| 20b, gptq of a layer, {tokens:,} tokens ({made['fed']:.2g} inputs per "
                f"dimension) | {seconds:.0f} s | {made['peak']:.1f} GB | "
                f"{layers * seconds / 3600:.1f} h |"
            )
        made = measured(folder, "profile", PROFILE_TOKENS)
        yield (
            f"| 20b, profile of a layer, {made['entries']:.0f} entries, "
            f"{PROFILE_TOKENS:,} tokens | "
            f"{made['profile']:.0f} s | {made['peak']:.1f} GB | "
            f"{layers * made['profile'] / 3600:.1f} h |"
        )
    else:
        (tokens,) = TOKENS[model]
        made = measured(folder, "batch", tokens)
        share = EXPERTS[model] / made["experts"]
        # Gate and up share their inputs and Hessians.
        seconds = 2 * made["inputs"] + share * (2 * made["hessians"] + 3 * made["quantizing"])
        yield (
            f"| 120b, gptq of {made['experts']:.0f} of 128 experts of a stack, {tokens:,} tokens "
            f"({made['fed']:.2g} inputs per dimension), without runs of the model | "
            f"{made['inputs'] + made['hessians'] + made['quantizing']:.0f} s | "
            f"{made['peak']:.1f} GB | {layers * seconds / 3600:.0f} h |"
        )


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    args = parser.parse_args()
    if args.models[:1] == ["part"]:
        folder, part, tokens = Path(args.models[1]), args.models[2], int(args.models[3])
        (folder / f"{part}.json").write_text(json.dumps(PARTS[part](folder, tokens)))
        return
    lines = []
    for model in args.models or LAYERS:
        with tempfile.TemporaryDirectory() as name:
            lines += rows(model, Path(name))
    table = "\n".join(
        [
            f"{machine()}.",
            "",
            "| measured | time | peak memory | all layers on this machine |",
            "|---|---|---|---|",
            *lines,
        ]
    )
    print(table)
    if not args.models:
        save(table, "full-width")


if __name__ == "__main__":
    main()
