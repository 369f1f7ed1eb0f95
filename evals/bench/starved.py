"""Quantizers when experts see few tokens, as those of gpt-oss do.

    python evals/bench/starved.py [TIER ...] [--caps 0.18,0.71,3.5,14]

On the demo model: of the inputs of the experts an evenly spread part is left, a multiple of their
width on average, and all of them for the pooled Hessian; the experts of every third layer are in
one tier (q3g64 and q2g32), other weights native. gptq as it was before (a quarter of the width for
the pool, nothing for the diagonal, scales refitted to integers that stay, and no error propagation)
stands beside gptq of today. One native pass serves all; the streams of the changed models follow it
layer by layer, on text to evaluate on. The tables go into README.md here.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from _common import machine, save

from quantkit.artifacts.fidelity import EVALUATED_TOKENS, Interval
from quantkit.backend import mx
from quantkit.calibration.calibration_set import CalibrationSpec, read_calibration_set
from quantkit.calibration.splits import CALIBRATE, EVALUATE, VALIDATE
from quantkit.checkpoint.source import open_source
from quantkit.demo.build import demo_checkpoint
from quantkit.evaluation.intervals import DocumentBootstrap
from quantkit.formats.affine import AffineWeight, concatenate
from quantkit.formats.tiers import Tier, parse_tier
from quantkit.quantizers import descent, gptq
from quantkit.quantizers.choose_prior import Choice, Sample, choose
from quantkit.quantizers.hessians import DEFAULT_PRIOR, Hessians, Prior, stacked
from quantkit.quantizers.input_sums import Inputs, InputSums
from quantkit.quantizers.matrix import quantize_rows, scales_dtype
from quantkit.quantizers.registry import Quantizer, find_quantizer
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import HookedLayer, LayerTrace, hooked
from quantkit.streaming.lm_head import ChangedModel, divergence
from quantkit.streaming.products import Product, packed_product
from quantkit.streaming.weight_loader import Call

TOKENS, VALIDATED, EVALUATED = 32768, 8192, EVALUATED_TOKENS
BEFORE = Prior(0.25, 0)
EVERY = 3  # layers
CAPS = [0.18, 0.71, 3.5, 14.0]  # inputs / width
METHODS = ("search", "gptq before", "gptq")


@dataclass
class Variant:
    """A method at a cap, with the stream of the changed model."""

    method: str
    cap: float | None
    stream: mx.array
    choices: Counter[str] = field(default_factory=Counter)


class CappedSums:
    """Sums over an evenly spread part of the inputs of each expert, and over all for the pool.

    An expert gets `cap` inputs per dimension on average, of the `average` that there are.
    """

    def __init__(self, shape: tuple[int, ...], cap: float, average: float) -> None:
        self.sums = InputSums(shape[0])
        self._share = min(1.0, cap * shape[-1] / average)
        self._pool = InputSums(1)
        self._seen = np.zeros(shape[0], np.int64)

    def add(self, inputs: Inputs, native: mx.array | None = None) -> None:
        """Add the inputs of one call, and the native ones (n, in) that they stand for."""
        x, experts = inputs.x, inputs.experts
        self._pool.add(Inputs(x), native)
        places = np.zeros(len(x), np.int64)  # of every input among those of its expert
        for e in range(len(self._seen)):
            (rows,) = np.nonzero(experts == e)
            places[rows] = self._seen[e] + np.arange(len(rows))
            self._seen[e] += len(rows)
        thinned = np.floor((places + 1) * self._share) > np.floor(places * self._share)
        (kept,) = np.nonzero(thinned)
        if len(kept):
            theirs = None if native is None else native[mx.array(kept)]
            self.sums.add(inputs.at(kept), theirs)
        self.sums.pooled, self.sums.pooled_count = self._pool.pooled, self._pool.pooled_count


class Before(Quantizer):
    """gptq with integers that stay once they are chosen."""

    def function(self) -> Callable[..., Any]:
        """Return its implementation."""

        def quantize(*args: Any) -> AffineWeight:
            with mock.patch.object(descent, "_move_integers", lambda pull, q, *_: (q, pull)):
                return gptq.quantize(*args)

        return quantize


@dataclass(frozen=True)
class LayerText:
    """The native runs of a layer on text to calibrate, and on text to validate."""

    model: StreamingModel
    module: HookedLayer
    tier: Tier
    calibrate: list[LayerTrace]
    validate: list[LayerTrace]

    def quantize(self, names: list[str], v: Variant) -> dict[str, AffineWeight]:
        """Quantize the experts `names` by the method of a variant."""
        down = [name for name in names if "down" in name]
        first = self._quantize_group([name for name in names if name not in down], v, {})
        products = {}
        if v.method != "gptq before":
            products = {n: packed_product(a.packed(self.tier), self.tier) for n, a in first.items()}
        return first | self._quantize_group(down, v, products)

    def _quantize_group(
        self, names: list[str], v: Variant, products: dict[str, Product]
    ) -> dict[str, AffineWeight]:
        """Quantize weights that share their inputs, which come from `products` where there are
        any."""
        shape = self.model.weights[names[0]].shape
        per_token = self.model.source.checkpoint.settings.experts_per_token or 1
        capped = CappedSums(shape, v.cap, TOKENS * per_token / shape[0])
        validation = InputSums(shape[0])
        for traces, sums in ((self.calibrate, capped), (self.validate, validation)):
            for trace in traces:
                for native, call in self.module.replay(trace, products, names[:1]):
                    theirs = Inputs.of(native.args).x if products else None
                    sums.add(Inputs.of(call.args), theirs)
        values = {name: stacked(self.model.values(name)).astype(mx.float32) for name in names}
        dtypes = {name: scales_dtype(self.model.weights[name]) for name in names}
        choice = Choice(DEFAULT_PRIOR, find_quantizer("search"))
        if v.method == "gptq before":
            choice = Choice(BEFORE, Before("gptq", "before"))
        if v.method == "gptq":
            samples = [Sample(values[name], self.tier, dtypes[name]) for name in names]
            choice = choose(samples, capped.sums, validation, find_quantizer("gptq"))
        prior = choice.prior
        v.choices[f"{choice.quantizer.name} {prior.pooled:g} {prior.diagonal:g}"] += 1
        parts: dict[str, list[AffineWeight]] = {name: [] for name in names}
        for some, moments in capped.sums.moments(prior):
            shared = Hessians(moments)
            for name in names:
                rows = values[name][some]
                part = quantize_rows(rows, shared, self.tier, choice.quantizer, dtypes[name])
                parts[name].append(part)
        return {name: concatenate(part, axis=0) for name, part in parts.items()}


def run(tier: Tier, caps: list[float]) -> tuple[list[Variant], np.ndarray, list[np.ndarray]]:
    """Return the variants, the documents of the text, and the KL divergences of its tokens."""
    source = open_source(str(demo_checkpoint()))
    texts = {
        split: read_calibration_set(source.checkpoint, CalibrationSpec(tokens=count), split)
        for split, count in ((CALIBRATE, TOKENS), (VALIDATE, VALIDATED), (EVALUATE, EVALUATED))
    }
    model = StreamingModel(source)
    evaluated = mx.array(texts[EVALUATE].tokens)
    streams = {s: model.calls(mx.array(t.tokens))[0].x for s, t in texts.items()}
    variants = [Variant("rtn", None, streams[EVALUATE])]
    variants += [Variant(m, cap, streams[EVALUATE]) for cap in caps for m in METHODS]
    calls = model.calls(evaluated[:1])
    start = time.time()
    for number, layer in enumerate(model.layers):
        names = [name for name in model.weights if name.startswith(f"{layer.path}.")]
        chosen = stacks_of(model, number)
        dry = calls[number]
        with hooked(layer, names) as module:
            text = recorded(model, module, tier, dry, streams)
            native = Call(streams[EVALUATE], dry.args, dry.kwargs)
            streams[EVALUATE] = through(module, native)
            for v in variants:
                changed: dict[str, AffineWeight | None] = dict.fromkeys(chosen)
                if v.cap is not None and chosen:
                    changed |= text.quantize(chosen, v)
                v.stream = through_changed(
                    module, model, tier, Call(v.stream, dry.args, dry.kwargs), changed
                )
        print(f"layer {number}, {time.time() - start:.0f} s", flush=True)
    changed = [ChangedModel(v.stream) for v in variants]
    kl = [np.array(tokens) for tokens in divergence(model, streams[EVALUATE], changed)]
    return variants, texts[EVALUATE].documents, kl


def stacks_of(model: StreamingModel, number: int) -> list[str]:
    """The stacks of a layer that change."""
    path = f"{model.layers[number].path}."
    names = [n for n, w in model.weights.items() if n.startswith(path) and len(w.shape) > 2]
    return [] if number % EVERY else names


def recorded(
    model: StreamingModel, module: HookedLayer, tier: Tier, dry: Call, streams: dict[str, mx.array]
) -> LayerText:
    """Run a layer on the `streams` to calibrate and to validate, which move on behind it."""
    traces = []
    for split in (CALIBRATE, VALIDATE):
        call = Call(streams[split], dry.args, dry.kwargs)
        traces.append([module.record(batch) for batch in call.batches()])
        streams[split] = mx.concatenate([trace.y for trace in traces[-1]])
    return LayerText(model, module, tier, *traces)


def through(module: HookedLayer, call: Call) -> mx.array:
    """Return the output of a layer (sequences, length, hidden), a few sequences at a time."""
    return mx.concatenate([module.run(batch) for batch in call.batches()])


def through_changed(
    module: HookedLayer,
    model: StreamingModel,
    tier: Tier,
    call: Call,
    changed: dict[str, AffineWeight | None],
) -> mx.array:
    """Return the output of a layer with changed experts."""
    with ExitStack() as stack:
        for name, affine in changed.items():
            stack.enter_context(module.changed(name, model.values(name), tier, affine))
        return through(module, call)


def lines(
    variants: list[Variant], documents: np.ndarray, kl: list[np.ndarray], caps: list[float]
) -> Iterator[str]:
    """Yield the rows of the table."""
    drawn = DocumentBootstrap.draw(np.random.default_rng(0), documents)
    found = {(v.method, v.cap): one.reshape(-1) for v, one in zip(variants, kl, strict=True)}
    rtn = drawn.mean(found["rtn", None]).value
    for cap in caps:
        search, before, now = (found[method, cap] for method in METHODS)
        yield (
            f"| {cap:g} | {rtn:.3f} | {drawn.mean(search).value:.4f} | "
            f"{drawn.mean(before).value:.4f} | {drawn.mean(now).value:.4f} | "
            f"{spelled(drawn.ratio(now, search))} | {spelled(drawn.ratio(now, before))} |"
        )


def spelled(ratio: Interval) -> str:
    """Return a ratio with its interval."""
    return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def table(tier: Tier, caps: list[float]) -> str:
    """Return what is compared with what, for one tier."""
    variants, documents, kl = run(tier, caps)
    for v in variants:
        print(v.method, v.cap, dict(v.choices))
    return "\n".join(
        [
            f"{machine()}; {tier.name}; {TOKENS:,} tokens for the pool, {VALIDATED:,} to choose "
            f"the prior, evaluated on {documents.size:,} tokens of {len(np.unique(documents))} "
            "other documents.",
            "",
            "| inputs / width | rtn | search | gptq before | gptq | over search | over before |",
            "|---|---|---|---|---|---|---|",
            *lines(variants, documents, kl, caps),
        ]
    )


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tiers", nargs="*", default=["q3g64", "q2g32"])
    parser.add_argument("--caps", default=",".join(map(str, CAPS)))
    args = parser.parse_args()
    try:
        caps = [float(cap) for cap in args.caps.split(",")]
    except ValueError:
        parser.error(f"--caps {args.caps}: write numbers, such as 0.18,3.5")
    if min(caps) <= 0:
        parser.error("--caps: an expert needs at least one input; a cap must be larger than 0")
    for name in args.tiers:
        text = table(parse_tier(name), caps)
        print(text)
        if caps == CAPS:
            save(text, f"starved-{name}")


if __name__ == "__main__":
    main()
