"""Predict the KL costs of one layer's weights from the gradient at its output.

With g = d log p(y) / d h for a label y drawn from the model, a change dh of the residual stream
costs about KL = 1/2 E (g . dh)^2 per token: the second-order expansion of the divergence, E g g^T
being the Fisher matrix. It is taken at a readout, whose gradient the backward pass has anyway. For
experts and projections of an MLP that is the weight's own output, to first order as good as the
layer's, by measurement. Projections of attention act at later positions, and through a softmax: the
readout is the mix of values, before the last projection. Other weights are read out at the layer's
output. Modules up to the readout run again with the quantized weight.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.artifacts.roles import ATTENTION_ROLES, EXPERT_ROLES, MLP_ROLES
from quantkit.backend import free_memory, mx
from quantkit.backend.cpu_functions import row_dots
from quantkit.errors import SourceError
from quantkit.quantizers.hessians import stacked
from quantkit.quantizers.input_sums import Inputs, InputSums, MemorySpool, has_inputs
from quantkit.quantizers.matrix import quantize_weight
from quantkit.quantizers.registry import RTN, find_quantizer
from quantkit.sensitivity.entries import Entry, EntryKey
from quantkit.sensitivity.expert_probe import ExpertProbe
from quantkit.sensitivity.quantizer_losses import Losses
from quantkit.sensitivity.second_order import predicted_kl
from quantkit.streaming.layer_trace import HookedLayer, LayerTrace, Readout, hooked
from quantkit.streaming.weight_loader import Call, StreamedModule


@dataclass
class ProbeResult:
    """The result of a probe.

    `costs` (sequences,) are KL costs per entry; `importance` (experts, in) the sum of squared
    inputs per channel and `seen` (experts,) the number of inputs, both by weight; `g` (draws,
    batch, tokens, hidden) the gradients at the layer's input; `losses` are those of quantizers.
    `rankings` (experts,) and `removal` (sequences,) are the ranking of a block's experts, best
    first, and the KL costs of keeping so many of them.
    """

    costs: dict[EntryKey, np.ndarray] = field(default_factory=dict)
    importance: dict[str, np.ndarray] = field(default_factory=dict)
    seen: dict[str, np.ndarray] = field(default_factory=dict)
    g: mx.array = field(default_factory=lambda: mx.zeros(0))
    losses: Losses = field(default_factory=dict)
    rankings: dict[str, np.ndarray] = field(default_factory=dict)
    removal: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerProbe:
    """Probes the `weights` of a layer.

    `values` returns a weight's values (..., out, in) by name; `quantizer` quantizes affine tiers.
    `experts` are the blocks to rank.
    """

    layer: StreamedModule
    weights: Sequence[Weight]
    values: Callable[[str], mx.array]
    quantizer: str = RTN
    experts: ExpertProbe | None = None

    def run(
        self, call: Call, g: mx.array, entries: Sequence[Entry], done: Callable[[str], None]
    ) -> ProbeResult:
        """Probe `entries`, all in this layer, for gradients `g` (draws, batch, tokens, hidden) at
        its output. `done` receives the name of each finished weight."""
        result = ProbeResult()
        stacks = [weight.name for weight in self.weights if len(weight.shape) > 2]
        with hooked(self.layer, [weight.name for weight in self.weights], stacks) as module:
            traces = [module.record(batch, _observer(result)) for batch in call.batches()]
            readouts = _readouts(self.weights, traces)
            gradients, result.g = _gradients(module, traces, g, set(readouts.values()))
            for weight in self.weights:
                of_weight = [entry for entry in entries if entry.weight.name == weight.name]
                if not of_weight:
                    continue
                _require_called(weight, traces[0])
                readout = readouts.get(weight.name)
                for entry, kl in self._probe(
                    module, traces, of_weight, readout, gradients[readout]
                ):
                    result.costs[entry.key] = kl
                done(weight.name)
                free_memory()
            if self.experts is not None:
                for ranked in self.experts.run(self.layer.path, module, traces, g):
                    result.rankings[ranked.block] = ranked.ranking
                    for count, kl in ranked.kl.items():
                        result.removal[ranked.block, count] = kl
        return result

    def _probe(
        self,
        module: HookedLayer,
        traces: Sequence[LayerTrace],
        entries: Sequence[Entry],
        readout: Readout | None,
        gradients: Sequence[mx.array],
    ) -> Iterator[tuple[Entry, np.ndarray]]:
        """Yield the KL costs of the entries of one weight, by the `gradients` at its readout."""
        weight, quantizer = entries[0].weight, find_quantizer(self.quantizer)
        native = self.values(weight.name)
        calls = [trace.steps for trace in traces]
        inputs = None
        if quantizer.calibrated and has_inputs(weight, calls[0]):
            inputs = InputSums(len(stacked(native)), MemorySpool())
            for step in (step for trace in traces for step in trace.calls_of(weight.name)):
                inputs.add(Inputs.of(step.args))
        tokens = [_tokens_at(readout, trace) for trace in traces]
        for entry in entries:
            quantized = None
            if inputs is not None and entry.tier.mode == "affine":
                quantized = quantize_weight(weight, native, inputs, entry.tier, quantizer)
            with module.changed(weight.name, native, entry.tier, quantized):
                slopes = []
                for trace, g, rows in zip(traces, gradients, tokens, strict=True):
                    moved = module.rerun(trace, weight.name, readout) - trace.values(readout)
                    slopes.append(_by_token(row_dots(g, moved), trace, rows))
                    mx.eval(slopes[-1])
                yield entry, predicted_kl(mx.concatenate(slopes, axis=1))


def _tokens_at(readout: Readout | None, trace: LayerTrace) -> mx.array | None:
    """Return the token (rows,) of every row at the readout; None where there is one per token."""
    if readout is None or readout.at_input:
        return None
    return trace.token_of_rows(trace.calls_of(readout.name)[0])


def _by_token(slopes: mx.array, trace: LayerTrace, tokens: mx.array | None) -> mx.array:
    """Return slopes (draws, sequences, tokens), summed over the rows of every token."""
    if tokens is None:
        return slopes
    sums = mx.zeros((len(slopes), trace.y.shape[0] * trace.y.shape[1]))
    sums = sums.at[:, tokens].add(slopes.reshape(len(slopes), -1))
    return sums.reshape(len(slopes), *trace.y.shape[:2])


def _require_called(weight: Weight, trace: LayerTrace) -> None:
    if all(step.name != weight.name for step in trace.steps):
        raise SourceError(
            f"{weight.name}: its layer runs without calling it, so the model cannot be profiled."
        )


def _readouts(weights: Sequence[Weight], traces: Sequence[LayerTrace]) -> dict[str, Readout]:
    """Return the readouts of weights, by name; others are read out at the layer's output."""
    order = [step.name for step in traces[0].steps]
    ends = [weight.name for weight in weights if weight.role == "o"]
    mixes = [name for name in ends if len(ends) == 1 and _by_rows(name, traces)]
    readouts = {}
    for weight in weights:
        if weight.role in EXPERT_ROLES:
            if _tokens_known(weight.name, traces):
                readouts[weight.name] = Readout(weight.name)
        elif weight.role in ("o", *MLP_ROLES):
            if _by_rows(weight.name, traces):
                readouts[weight.name] = Readout(weight.name)
        elif weight.role in ATTENTION_ROLES and weight.name in order:
            for mix in mixes:
                if order.index(weight.name) < order.index(mix):
                    readouts[weight.name] = Readout(mix, at_input=True)
    return readouts


def _by_rows(name: str, traces: Sequence[LayerTrace]) -> bool:
    """Return whether a matrix is called once, with one row per token."""
    return all(
        [(step.args[0].ndim, step.y.shape[:2]) for step in trace.calls_of(name)]
        == [(3, trace.y.shape[:2])]
        for trace in traces
    )


def _tokens_known(name: str, traces: Sequence[LayerTrace]) -> bool:
    """Return whether a stack is called once, with rows whose tokens are known."""
    for trace in traces:
        steps = trace.calls_of(name)
        if len(steps) != 1 or trace.token_of_rows(steps[0]) is None:
            return False
    return True


def _gradients(
    module: HookedLayer, traces: Sequence[LayerTrace], g: mx.array, readouts: Collection[Readout]
) -> tuple[dict[Readout | None, list[mx.array]], mx.array]:
    """Return gradients (draws, ...) at `readouts` for every trace, and at the layer's input (draws,
    batch, tokens, hidden).

    Under None stand those at the layer's output.
    """
    places = sorted(readouts, key=lambda readout: (readout.name, readout.at_input))
    at_places: dict[Readout | None, list[mx.array]] = {place: [] for place in (None, *places)}
    at_input: list[mx.array] = []
    start = 0
    for trace in traces:
        at_output = g[:, start : start + len(trace.y)]
        start += len(trace.y)
        at_places[None].append(at_output)
        draws = [module.gradients(trace, draw, places) for draw in at_output]
        at_input.append(mx.stack([x for x, _ in draws]))
        for place in places:
            at_places[place].append(mx.stack([values[place] for _, values in draws]))
    return at_places, mx.concatenate(at_input, axis=1)


def _observer(result: ProbeResult) -> Callable[[str, mx.array, "mx.array | None"], None]:
    """Return an observer that sums squared inputs and counts inputs, per expert if there are
    any.
    """

    def observe(name: str, x: mx.array, indices: mx.array | None) -> None:
        inputs = Inputs.of((x,) if indices is None else (x, indices))
        squares = mx.square(inputs.x)
        if inputs.experts is None:
            total, count = squares.sum(axis=0, keepdims=True), np.array([len(squares)])
        else:
            experts = np.arange(inputs.experts.max() + 1)
            which = mx.array(inputs.experts[None, :] == experts[:, None]).astype(mx.float32)
            total, count = which @ squares, np.bincount(inputs.experts)
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
