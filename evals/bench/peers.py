"""Calibrated quantizers side by side: quantkit, mlx_lm.gptq, mlx_lm.awq, mlx_lm.dynamic_quant.

    python evals/bench/peers.py

On plain SmolLM2-135M in BF16. Each tool runs in its own process, by its own main(), on the same
text, in float32 (BLAS on a CPU has no BF16 products), and stores BF16. quantkit gets the bytes of
mlx_lm.gptq. All repos are compared to the native model on documents that calibrated nothing.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from _common import machine, run, save

from quantkit.backend import mx
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.checkpoint.source import open_source
from quantkit.demo.build import plain_checkpoint
from quantkit.jobs.compare import compare

PROFILED, ROUNDED = 4096, 16384  # tokens: quantkit's defaults
FOUR_BITS = ["--bits", "4", "--group-size", "64"]
PEERS = {
    "mlx_lm.convert": ["-q", "--q-bits", "4", "--q-group-size", "64"],
    "mlx_lm.gptq": [*FOUR_BITS, "--fallback-bits", "4", "--fallback-group-size", "64"],
    "mlx_lm.awq": [*FOUR_BITS, "--embed-bits", "4", "--embed-group-size", "64"],
    "mlx_lm.dynamic_quant": ["--target-bpw", "4.5", "--low-bits", "3", "--high-bits", "5"],
}


def peer(name: str, out: str, options: list[str]) -> None:
    """Run one of mlx-lm's own, in this process, on our text and in float32."""
    if name == "mlx_lm.convert":
        from mlx_lm.convert import main as entry
    else:
        entry = prepared(name)
    os.chdir(Path(out).parent)  # where dynamic_quant leaves its sensitivities
    sys.argv = [name, "--model", str(plain_checkpoint()), "--mlx-path", out, *options]
    entry()


def prepared(name: str):
    """A tool's main(), which then reads our text, computes in float32 and stores BF16."""
    from importlib import import_module

    module = import_module(f"mlx_lm.quant.{name.rpartition('.')[2]}")
    load, store = module.load, module.save
    count = ROUNDED if name == "mlx_lm.gptq" else PROFILED
    checkpoint = open_source(str(plain_checkpoint())).checkpoint
    tokens = read_calibration_set(checkpoint, CalibrationSpec(tokens=count)).tokens

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
    module.load_data = lambda *_, **__: mx.array(tokens)
    return module.main


def table() -> str:
    source = open_source(str(plain_checkpoint()))
    rows: list[tuple[str, float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outs: list[str] = []

        def add(label: str, out: Path, command: list[str]) -> None:
            rows.append((label, *run(command)))
            outs.append(str(out))
            print(*rows[-1], flush=True)

        for peer_name, options in PEERS.items():
            command = [sys.executable, __file__, "peer", peer_name, str(folder / peer_name)]
            add(" ".join([peer_name, *options]), folder / peer_name, [*command, *options])
        like, out = folder / "mlx_lm.gptq", folder / "ours"
        own = [sys.executable, "-m", "quantkit", "quantize", "demo-llama", "-o", str(out)]
        add("quantkit, its profile included", out, [*own, "--budget", f"like:{like}"])
        found = compare(source, outs)
    lines = []
    for (label, seconds, peak), result in zip(rows, found, strict=True):
        kl = result.kl_mean
        lines.append(
            f"| {label} | {result.bits_per_weight:.3f} | {kl.value:.4f} ({kl.low:.4f} to "
            f"{kl.high:.4f}) | {kl.value / found[0].kl_mean.value:.3f} | "
            f"{100 * result.top1_agreement.value:.1f}% | {seconds:.0f} s | {peak:.1f} GB |"
        )
    return "\n".join(
        [
            f"{machine()}; SmolLM2-135M; {ROUNDED} tokens for gptq, theirs and ours, {PROFILED} "
            f"for awq, dynamic_quant and our profile; evaluated on {found[0].tokens:,} "
            f"tokens of {found[0].documents} other documents.",
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
    if args.what:
        peer(args.what[1], args.what[2], options)
        return
    text = table()
    print(text)
    save(text, "peers")


if __name__ == "__main__":
    main()
