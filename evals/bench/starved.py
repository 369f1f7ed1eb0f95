"""Quantizers when experts see few tokens, as those of gpt-oss do.

    python evals/bench/starved.py [TIER ...] [--caps 0.18,0.71,3.5,14]

On the demo model: the inputs of every expert are capped at a multiple of their width, with all
text for the pooled Hessian; the experts of every third layer are in one tier (q3g64 and q2g32),
other weights native. gptq
with the prior that it had before (a quarter of the width for the pool, nothing for the diagonal)
stands beside gptq of today. One native pass serves all; the streams of the changed models follow
it layer by layer, on text to evaluate on. The table goes into README.md here.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from _common import machine, save

from quantkit.backend import mx
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.splits import CALIBRATE, EVALUATE, VALIDATE
from quantkit.checkpoint.source import open_source
from quantkit.demo.build import demo_checkpoint
from quantkit.evaluation.intervals import DocumentBootstrap
from quantkit.formats.affine import AffineWeight, concatenate
from quantkit.formats.tiers import Tier, parse_tier
from quantkit.quantizers.choose_prior import Choice, Sample, choose
from quantkit.quantizers.hessians import (
    DEFAULT_PRIOR,
    Hessians,
    InputSums,
    Prior,
    inputs_of,
    stacked,
)
from quantkit.quantizers.matrix import quantize_rows, scales_dtype
from quantkit.quantizers.registry import find_quantizer
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import HookedLayer, ModuleCall, hooked
from quantkit.streaming.lm_head import ChangedModel, divergence
from quantkit.streaming.weight_loader import Call

TOKENS, VALIDATED, EVALUATED = 32768, 8192, 8192
BEFORE = Prior(0.25, 0)
EVERY = 3  # layers
METHODS = ("search", "gptq before", "gptq")


@dataclass
class Variant:
    """A tier and a method at a cap, with the stream of the changed model."""

    tier: Tier
    method: str
    cap: float | None
    stream: mx.array
    choices: Counter[str] = field(default_factory=Counter)


class CappedSums:
    """Sums over the first inputs of each expert, for several caps, and over all for the pool."""

    def __init__(self, matrices: int, most: list[int]) -> None:
        self.of = [InputSums(matrices) for _ in most]
        self._most = most

    def add(self, call: ModuleCall) -> None:
        """Add the inputs of one call."""
        x, experts = inputs_of(call)
        pooled, count = self.of[0].pooled + x.T @ x, self.of[0].pooled_count + len(x)
        mx.eval(pooled)
        for sums, most in zip(self.of, self._most, strict=True):
            rows = [
                np.flatnonzero(experts == e)[: most - int(sums.counts[e])]
                for e in range(len(sums.counts))
            ]
            kept = np.concatenate(rows)
            if len(kept):
                some = (x[mx.array(kept)], mx.array(experts[kept]))
                sums.add(ModuleCall(call.name, some, call.y))
            sums.pooled, sums.pooled_count = pooled, count


def quantized(
    names: list[str], model: StreamingModel, sums: InputSums, validation: InputSums, v: Variant
) -> dict[str, AffineWeight]:
    """Quantize the weights `names`, which share their inputs, by the method of a variant."""
    values = {name: stacked(model.values(name)).astype(mx.float32) for name in names}
    quantizer = find_quantizer("search" if v.method == "search" else "gptq")
    choice = Choice(BEFORE if v.method == "gptq before" else DEFAULT_PRIOR, quantizer)
    if v.method == "gptq":
        samples = [Sample(values[n], v.tier, scales_dtype(model.weights[n])) for n in names]
        choice = choose(samples, sums, validation, quantizer)
    v.choices[f"{choice.quantizer.name} {choice.prior.pooled:g} {choice.prior.diagonal:g}"] += 1
    parts: dict[str, list[AffineWeight]] = {name: [] for name in names}
    for some, hessian in sums.hessians(choice.prior):
        shared = Hessians(hessian)
        for name in names:
            dtype = scales_dtype(model.weights[name])
            parts[name].append(
                quantize_rows(values[name][some], shared, v.tier, choice.quantizer, dtype)
            )
    return {name: concatenate(part, axis=0) for name, part in parts.items()}


def run(tiers: list[Tier], caps: list[float]) -> tuple[list[Variant], np.ndarray, list[np.ndarray]]:
    """Return the variants, the documents of the text, and the KL divergences of its tokens."""
    source = open_source(str(demo_checkpoint()))
    texts = {
        split: read_calibration_set(source.checkpoint, CalibrationSpec(tokens=count), split)
        for split, count in ((CALIBRATE, TOKENS), (VALIDATE, VALIDATED), (EVALUATE, EVALUATED))
    }
    model = StreamingModel(source)
    evaluated = mx.array(texts[EVALUATE].tokens)
    streams = {s: model.calls(mx.array(t.tokens))[0].x for s, t in texts.items()}
    variants = [Variant(tier, "rtn", None, streams[EVALUATE]) for tier in tiers]
    for tier in tiers:
        variants += [Variant(tier, m, cap, streams[EVALUATE]) for cap in caps for m in METHODS]
    calls = model.calls(evaluated[:1])
    start = time.time()
    for number, layer in enumerate(model.layers):
        stacks = [
            name
            for name, weight in model.weights.items()
            if name.startswith(f"{layer.path}.") and len(weight.shape) > 2
        ]
        chosen = stacks if number % EVERY == 0 else []
        dry = calls[number]
        with hooked(layer, chosen) as module:
            sums = shared_sums(model, module, dry, streams, chosen, caps)
            native = Call(streams[EVALUATE], dry.args, dry.kwargs)
            streams[EVALUATE] = through(module, native)
            for v in variants:
                changed: dict[str, AffineWeight | None] = dict.fromkeys(chosen)
                if v.cap is not None:
                    for names, (capped, validation) in sums.items():
                        own = capped.of[caps.index(v.cap)]
                        changed |= quantized(list(names), model, own, validation, v)
                v.stream = through_changed(module, model, dry, v, changed)
        print(f"layer {number}, {time.time() - start:.0f} s", flush=True)
    kl = []
    for v in variants:
        (found,) = divergence(model, streams[EVALUATE], [ChangedModel(v.stream)])
        kl.append(np.array(found))
    return variants, texts[EVALUATE].documents, kl


def shared_sums(
    model: StreamingModel,
    module: HookedLayer,
    dry: Call,
    streams: dict[str, mx.array],
    stacks: list[str],
    caps: list[float],
) -> dict[tuple[str, ...], tuple[CappedSums, InputSums]]:
    """Take the native streams through a layer; return the sums of stacks that share inputs."""
    down = [name for name in stacks if "down" in name]
    groups = [tuple(n for n in stacks if n not in down), tuple(down)] if stacks else []
    sums = {}
    for names in groups:
        experts, _, width = model.weights[names[0]].shape
        capped = CappedSums(experts, [max(1, int(cap * width)) for cap in caps])
        sums[names] = (capped, InputSums(experts))
    for split in (CALIBRATE, VALIDATE):
        outs = []
        for batch in Call(streams[split], dry.args, dry.kwargs).batches():
            trace = module.record(batch)
            outs.append(trace.y)
            for names, (capped, validation) in sums.items():
                for step in trace.steps:
                    if step.name == names[0]:
                        (capped if split == CALIBRATE else validation).add(step)
        streams[split] = mx.concatenate(outs)
    return sums


def through(module: HookedLayer, call: Call) -> mx.array:
    """Return the output of a layer (sequences, length, hidden), a few sequences at a time."""
    return mx.concatenate([module.run(batch) for batch in call.batches()])


def through_changed(
    module: HookedLayer,
    model: StreamingModel,
    dry: Call,
    v: Variant,
    changed: dict[str, AffineWeight | None],
) -> mx.array:
    """Return the output of a layer with changed experts."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        for name, affine in changed.items():
            values = model.values(name)
            stack.enter_context(module.changed(name, values, v.tier, affine))
        return through(module, Call(v.stream, dry.args, dry.kwargs))


def lines(
    variants: list[Variant], documents: np.ndarray, kl: list[np.ndarray], caps: list[float]
) -> Iterator[str]:
    """Yield the rows of the table."""
    drawn = DocumentBootstrap.draw(np.random.default_rng(0), documents)
    found = {
        (v.tier.name, v.method, v.cap): drawn.mean(one.reshape(-1))
        for v, one in zip(variants, kl, strict=True)
    }
    for tier in dict.fromkeys(v.tier.name for v in variants):
        rtn = found[tier, "rtn", None].value
        for cap in caps:
            search, before, now = (found[tier, method, cap] for method in METHODS)
            yield (
                f"| {tier} | {cap:g} | {rtn:.3f} | {search.value:.4f} | {before.value:.4f} | "
                f"{now.value:.4f} ({now.low:.4f} to {now.high:.4f}) | "
                f"{now.value / search.value:.3f} | {now.value / before.value:.3f} |"
            )


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tiers", nargs="*", default=["q3g64", "q2g32"])
    parser.add_argument("--caps", default="0.18,0.71,3.5,14")
    args = parser.parse_args()
    try:
        caps = [float(cap) for cap in args.caps.split(",")]
    except ValueError:
        parser.error(f"--caps {args.caps}: write numbers, such as 0.18,3.5")
    if min(caps) <= 0:
        parser.error("--caps: an expert needs at least one input; a cap must be larger than 0")
    variants, documents, kl = run([parse_tier(name) for name in args.tiers], caps)
    for v in variants:
        print(v.tier.name, v.method, v.cap, dict(v.choices))
    table = "\n".join(
        [
            f"{machine()}; {TOKENS:,} tokens for the pool, {VALIDATED:,} to choose the prior, "
            f"evaluated on {documents.size:,} tokens of {len(np.unique(documents))} other "
            "documents.",
            "",
            "| tier | inputs / width | rtn | search | gptq before | gptq | over search | over "
            "before |",
            "|---|---|---|---|---|---|---|---|",
            *lines(variants, documents, kl, caps),
        ]
    )
    print(table)
    if args.tiers == ["q3g64", "q2g32"]:
        save(table, "starved")


if __name__ == "__main__":
    main()
