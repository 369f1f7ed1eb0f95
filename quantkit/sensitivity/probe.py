"""Predict the KL costs of one layer's weights from the gradient at its output.

With g = d log p(y) / d h for a label y drawn from the model, a change dh of the residual stream
costs about KL = 1/2 E (g . dh)^2 per token: the second-order expansion of the divergence, E g g^T
being the Fisher matrix. dh comes from running the layer again with the quantized weight. For the
projections of attention it is read out at the output of attention, so that the experts behind it
need not run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.artifacts.roles import ATTENTION_ROLES, MLP_ROLES
from quantkit.backend import free_memory, mx
from quantkit.errors import SourceError
from quantkit.quantizers.hessians import InputSums, MemorySpool, has_inputs, stacked
from quantkit.quantizers.matrix import quantize_weight
from quantkit.quantizers.registry import RTN, find_quantizer
from quantkit.sensitivity.entries import Entry, EntryKey
from quantkit.streaming.layer_trace import HookedLayer, LayerTrace, hooked
from quantkit.streaming.weight_loader import Call, StreamedModule


@dataclass
class ProbeResult:
    """The result of a probe.

    `costs` (sequences,) are KL costs per entry; `importance` (experts, in) the sum of squared
    inputs per channel and `seen` (experts,) the number of inputs, both by weight; `g` (draws,
    batch, tokens, hidden) the gradients at the layer's input.
    """

    costs: dict[EntryKey, np.ndarray] = field(default_factory=dict)
    importance: dict[str, np.ndarray] = field(default_factory=dict)
    seen: dict[str, np.ndarray] = field(default_factory=dict)
    g: mx.array = field(default_factory=lambda: mx.zeros(0))


@dataclass(frozen=True)
class LayerProbe:
    """Probes the `weights` of a layer.

    `values` returns a weight's values (..., out, in) by name; `quantizer` quantizes affine tiers.
    """

    layer: StreamedModule
    weights: Sequence[Weight]
    values: Callable[[str], mx.array]
    quantizer: str = RTN

    def run(
        self, call: Call, g: mx.array, entries: Sequence[Entry], done: Callable[[str], None]
    ) -> ProbeResult:
        """Probe `entries`, all in this layer, for gradients `g` (draws, batch, tokens, hidden) at
        its output. `done` receives the name of each finished weight."""
        result = ProbeResult()
        with hooked(self.layer, [weight.name for weight in self.weights]) as module:
            traces = [module.record(batch, _observer(result)) for batch in call.batches()]
            readouts = _readouts(self.weights, traces[0])
            at_readouts, result.g = _gradients(module, traces, g, sorted(set(readouts.values())))
            at_readouts[""] = g
            for weight in self.weights:
                of_weight = [entry for entry in entries if entry.weight.name == weight.name]
                if not of_weight:
                    continue
                _require_called(weight, traces[0])
                readout = readouts.get(weight.name)
                for entry, kl in self._probe(module, traces, of_weight, readout, at_readouts):
                    result.costs[entry.key] = kl
                done(weight.name)
                free_memory()
        return result

    def _probe(
        self,
        module: HookedLayer,
        traces: Sequence[LayerTrace],
        entries: Sequence[Entry],
        readout: str | None,
        gradients: Mapping[str, mx.array],
    ) -> Iterator[tuple[Entry, np.ndarray]]:
        """Yield the KL costs of the entries of one weight, whose effect is taken at `readout`."""
        weight, quantizer = entries[0].weight, find_quantizer(self.quantizer)
        native = self.values(weight.name)
        calls = [trace.steps for trace in traces]
        inputs = None
        if quantizer.calibrated and has_inputs(weight, calls[0]):
            inputs = InputSums(len(stacked(native)), MemorySpool())
            for step in (step for steps in calls for step in steps if step.name == weight.name):
                inputs.add(step)
        for entry in entries:
            quantized = None
            if inputs is not None and entry.tier.mode == "affine":
                quantized = quantize_weight(weight, native, inputs, entry.tier, quantizer)
            with module.changed(weight.name, native, entry.tier, quantized):
                changed = ((t, module.rerun(t, weight.name, readout)) for t in traces)
                moved = (y - trace.output(readout) for trace, y in changed)
                yield entry, predicted_kl(moved, gradients[readout or ""])


def predicted_kl(moved: Iterator[mx.array], g: mx.array) -> np.ndarray:
    """Return 1/2 mean (g . dh)^2 per sequence (sequences,).

    `moved` yields the changes dh (batch, tokens, width) of a few sequences at a time, `g` (draws,
    sequences, tokens, width) are gradients.
    """
    costs, start = [], 0
    for dh in moved:
        slope = (g[:, start : start + len(dh)] * dh).sum(axis=-1)
        kl = 0.5 * mx.square(slope).mean(axis=(0, 2))
        mx.eval(kl)
        costs.append(np.array(kl, np.float32))
        start += len(dh)
    return np.concatenate(costs)


def _require_called(weight: Weight, trace: LayerTrace) -> None:
    if all(step.name != weight.name for step in trace.steps):
        raise SourceError(
            f"{weight.name}: its layer runs without calling it, so the model cannot be profiled."
        )


def _readouts(weights: Sequence[Weight], trace: LayerTrace) -> dict[str, str]:
    """Return the readout of each weight: the weight at whose output its effect is measured.

    The readout is the block's last projection, if that is called once, and after the weight. Other
    weights are read out at the layer's output.
    """
    order = [step.name for step in trace.steps]
    readouts = {}
    for roles, last in ((ATTENTION_ROLES, "o"), (MLP_ROLES, "mlp_down")):
        ends = [weight.name for weight in weights if weight.role == last]
        if len(ends) == 1 and order.count(ends[0]) == 1:
            for weight in weights:
                if (
                    weight.name in order
                    and weight.role in roles
                    and order.index(weight.name) <= order.index(ends[0])
                ):
                    readouts[weight.name] = ends[0]
    return readouts


def _gradients(
    module: HookedLayer, traces: Sequence[LayerTrace], g: mx.array, names: Sequence[str]
) -> tuple[dict[str, mx.array], mx.array]:
    """Return gradients (draws, batch, ...) at the outputs of `names`, and at the layer's input."""
    at_input: list[mx.array] = []
    at_names: dict[str, list[mx.array]] = {name: [] for name in names}
    for draw in g:
        start, inputs = 0, []
        outputs: dict[str, list[mx.array]] = {name: [] for name in names}
        for trace in traces:
            at_output = draw[start : start + len(trace.y)]
            start += len(trace.y)
            x, at_outputs = module.gradients(trace, at_output, names)
            inputs.append(x)
            for name in names:
                outputs[name].append(at_outputs[name])
        at_input.append(mx.concatenate(inputs))
        for name in names:
            at_names[name].append(mx.concatenate(outputs[name]))
    return {name: mx.stack(arrays) for name, arrays in at_names.items()}, mx.stack(at_input)


def _observer(result: ProbeResult) -> Callable[[str, mx.array, "mx.array | None"], None]:
    """Return an observer that sums squared inputs and counts inputs, per expert if there are
    any.
    """

    def observe(name: str, x: mx.array, indices: mx.array | None) -> None:
        width = x.shape[-1]
        if indices is None:
            total = mx.square(x.astype(mx.float32)).reshape(-1, width).sum(axis=0, keepdims=True)
            count = np.array([x.size // width])
        else:
            spread = mx.broadcast_to(x, (*indices.shape, 1, width)) if x.ndim > 3 else x
            squares = mx.square(spread.astype(mx.float32)).reshape(-1, width)
            flat = np.array(indices).reshape(-1)
            experts = int(flat.max()) + 1
            which = mx.array(flat[None, :] == np.arange(experts)[:, None]).astype(mx.float32)
            total, count = which @ squares, np.bincount(flat)
        result.importance[name] = _added(result.importance.get(name), np.array(total))
        result.seen[name] = _added(result.seen.get(name), count)

    return observe


def _added(before: np.ndarray | None, more: np.ndarray) -> np.ndarray:
    """Return the sum of two arrays, one of which may have fewer experts."""
    if before is None:
        return more
    total = np.zeros((max(len(before), len(more)), *more.shape[1:]), more.dtype)
    total[: len(before)] += before
    total[: len(more)] += more
    return total
