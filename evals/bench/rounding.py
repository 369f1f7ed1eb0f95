"""gptq of today beside that of an earlier revision: seconds and objective, on the same Hessians.

    python evals/bench/rounding.py [REVISION]

The experts in three layers of the demo, all experts of a stack at once, on one thread. Stacks with
the same inputs, gate and up, are quantized at once today. REVISION is a commit of this repository,
by default the last one before coordinate descent; its modules run beside today's. The objective is
the error on the calibrated inputs, so that both solve the same problem.
"""

import argparse
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
from _common import machine, save

from quantkit.backend import mx
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.checkpoint.source import open_source
from quantkit.demo.build import demo_checkpoint
from quantkit.formats.tiers import parse_tier
from quantkit.quantizers import gptq
from quantkit.quantizers.hessians import DEFAULT_PRIOR, Hessians, objective, shrunk
from quantkit.quantizers.input_sums import Inputs
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import hooked
from quantkit.streaming.weight_loader import Call

BEFORE = "746b113"
LAYERS = (4, 14, 24)
TIERS = ("q3g64", "q2g32")
ROUNDS = 3  # of every measurement, in turns; the least counts


def module_of(revision: str, name: str, others: dict[str, str]) -> types.ModuleType:
    """A module of the quantizers as it was, which imports `others` under these names."""
    path = f"quantkit/quantizers/{name}.py"
    root = Path(__file__).parents[2]
    shown = subprocess.run(
        ["git", "show", f"{revision}:{path}"], cwd=root, capture_output=True, text=True, check=True
    )
    code = shown.stdout
    for old, new in others.items():
        code = code.replace(f"from quantkit.quantizers.{old} import", f"from {new} import")
    module = types.ModuleType(f"before_{name}")
    sys.modules[module.__name__] = module
    exec(compile(code, path, "exec"), module.__dict__)
    return module


def cases(tokens: np.ndarray):
    """(weights (experts, out, in) with the same inputs, their Hessians (experts, in, in))."""
    source = open_source(str(demo_checkpoint()))
    model = StreamingModel(source)
    calls = {}
    model.run(mx.array(tokens), lambda number, call, _y: calls.update({number: call}))
    for number in LAYERS:
        layer = model.layers[number]
        at = f"{layer.path}.mlp.experts"
        names = [f"{at}.gate_proj", f"{at}.down_proj"]
        sums: dict[str, list[Inputs]] = {name: [] for name in names}
        with hooked(layer, names) as module:
            call = calls[number]
            for batch in Call(call.x, call.args, call.kwargs).batches():
                for step in module.record(batch).steps:
                    sums[step.name].append(Inputs.of(step.args))
        for name in names:
            x = mx.concatenate([inputs.x for inputs in sums[name]])
            experts = np.concatenate([inputs.experts for inputs in sums[name]])
            pooled = x.T @ x / len(x)
            hessians = []
            for expert in range(experts.max() + 1):
                rows = x[mx.array(np.flatnonzero(experts == expert))]
                hessians.append(shrunk(rows.T @ rows, len(rows), pooled, DEFAULT_PRIOR))
            alike = [name, f"{at}.up_proj"] if name == names[0] else [name]
            yield [model.values(w).astype(mx.float32) for w in alike], mx.stack(hessians)


def timed(quantize, weights: list[mx.array], hessian: mx.array, tier) -> tuple[float, float]:
    """(seconds of this process, objective) of a quantizer, its factors included."""
    started = time.process_time()
    hessians, results = Hessians(hessian), []
    for weight in weights:
        results.append(quantize(weight, hessians, tier, mx.bfloat16))
        mx.eval(results[-1].q, results[-1].scales, results[-1].biases)
    seconds = time.process_time() - started
    errors = [
        objective(weight, result.dequantized(tier), hessian).sum().item()
        for weight, result in zip(weights, results, strict=True)
    ]
    return seconds, sum(errors)


def table(revision: str) -> str:
    module_of(revision, "search", {})
    before = module_of(revision, "gptq", {"search": "before_search"})
    spec = CalibrationSpec(tokens=8192)
    text = read_calibration_set(open_source(str(demo_checkpoint())).checkpoint, spec)
    stacks = list(cases(text.tokens))
    lines = []
    for name in TIERS:
        tier = parse_tier(name)
        total = np.zeros((2, 2))
        for weights, hessian in stacks:
            together = [mx.concatenate(weights, axis=-2)]
            rows = [
                [
                    timed(before.quantize, weights, hessian, tier),
                    timed(gptq.quantize, together, hessian, tier),
                ]
                for _ in range(ROUNDS)
            ]
            total += np.array(rows).min(axis=0)
        (old, worse), (new, better) = total
        lines.append(
            f"| {name} | {old:.1f} s | {new:.1f} s | {old / new:.2f} | {better / worse:.4f} |"
        )
    return "\n".join(
        [
            f"{machine()}; {sum(len(w) for w, _ in stacks)} stacks of 8 experts, "
            f"{text.tokens.size:,} tokens; CPU seconds, the least of {ROUNDS} rounds in "
            f"turns; before: {revision}.",
            "",
            "| tier | before | now | times faster | objective, now over before |",
            "|---|---|---|---|---|",
            *lines,
        ]
    )


def main() -> None:
    """Make the table, and put it into README.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revision", nargs="?", default=BEFORE)
    save(table(parser.parse_args().revision), "rounding")


if __name__ == "__main__":
    main()
