"""The losses of one layer's weights, predicted from the gradient behind it.

With g = d log p(y) / d h for a label y drawn from the model itself, a change dh of the residual
stream costs about KL = 1/2 E (g . dh)^2 per token: the second-order expansion of the divergence,
E g g^T being the Fisher matrix. dh comes from running the layer again with the weight rounded. For
the projections of attention it is taken at the output of attention, so that the experts behind it
need not run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.artifacts.roles import ATTENTION_ROLES, MLP_ROLES
from quantkit.backend import free_memory, mx
from quantkit.errors import SourceError
from quantkit.quantizers.hessians import has_inputs, inputs_of
from quantkit.quantizers.rounding import rounded_whole
from quantkit.sensitivity.entries import Entry, Key
from quantkit.streaming.layer_trace import HookedLayer, Trace, hooked
from quantkit.streaming.weight_loader import Call, StreamedModule


@dataclass
class Found:
    """What a layer's probe gives.

    `losses` per entry and sequence; `importance` the sum of squared inputs per channel (experts,
    in) and `seen` the number of inputs per expert, both by weight; `g` the gradients (draws,
    batch, tokens, hidden) at the layer's input.
    """

    losses: dict[Key, np.ndarray] = field(default_factory=dict)
    importance: dict[str, np.ndarray] = field(default_factory=dict)
    seen: dict[str, np.ndarray] = field(default_factory=dict)
    g: mx.array = field(default_factory=lambda: mx.zeros(0))


def probe_layer(
    layer: StreamedModule,
    call: Call,
    g: mx.array,
    weights: Sequence[Weight],
    entries: Sequence[Entry],
    values: Callable[[str], mx.array],
    done: Callable[[str], None],
    rounding: str = "rtn",
) -> Found:
    """Probe `entries`, all of this layer, given gradients `g` (draws, ...) at its output.

    `values` gives a weight's own values by name; affine tiers are rounded by `rounding`.
    """
    found = Found()
    with hooked(layer, [weight.name for weight in weights]) as module:
        traces = [module.record(part, _listener(found)) for part in call.parts()]
        sinks = _sinks(weights, traces[0])
        at_sinks, found.g = _gradients(module, traces, g, sorted(set(sinks.values())))
        at_sinks[""] = g
        for weight in weights:
            own = [entry for entry in entries if entry.weight.name == weight.name]
            if not own:
                continue
            _require_called(weight, traces[0])
            native = values(weight.name)
            steps = [trace.steps for trace in traces]
            known = rounding != "rtn" and has_inputs(weight, steps[0])
            inputs = inputs_of(weight.name, steps) if known else None
            for entry in own:
                until = sinks.get(weight.name)
                made = None
                if inputs is not None and entry.tier.mode == "affine":
                    made = rounded_whole(weight, native, inputs, entry.tier, rounding)
                with module.changed(weight.name, native, entry.tier, made):
                    changed = ((t, module.rerun(t, weight.name, until)) for t in traces)
                    moved = (y - trace.output(until) for trace, y in changed)
                    found.losses[entry.key] = predicted(moved, at_sinks[until or ""])
                done(weight.name)
            del native
            free_memory()
    return found


def predicted(moved: Iterator[mx.array], g: mx.array) -> np.ndarray:
    """1/2 mean (g . dh)^2 per sequence, for the changes dh of a few sequences at a time."""
    losses, start = [], 0
    for dh in moved:
        slope = (g[:, start : start + len(dh)] * dh).sum(axis=-1)
        loss = 0.5 * mx.square(slope).mean(axis=(0, 2))
        mx.eval(loss)
        losses.append(np.array(loss, np.float32))
        start += len(dh)
    return np.concatenate(losses)


def _require_called(weight: Weight, trace: Trace) -> None:
    if all(step.name != weight.name for step in trace.steps):
        raise SourceError(
            f"{weight.name}: its layer runs without calling it; such models cannot be profiled."
        )


def _sinks(weights: Sequence[Weight], trace: Trace) -> dict[str, str]:
    """Weight -> the weight at whose output its effect is taken; the layer's where not listed.

    That is the block's last projection, if it is called once and after the weight.
    """
    order = [step.name for step in trace.steps]
    sinks = {}
    for roles, last in ((ATTENTION_ROLES, "o"), (MLP_ROLES, "mlp_down")):
        ends = [weight.name for weight in weights if weight.role == last]
        if len(ends) == 1 and order.count(ends[0]) == 1:
            for weight in weights:
                if (
                    weight.name in order
                    and weight.role in roles
                    and order.index(weight.name) <= order.index(ends[0])
                ):
                    sinks[weight.name] = ends[0]
    return sinks


def _gradients(
    module: HookedLayer, traces: Sequence[Trace], g: mx.array, names: Sequence[str]
) -> tuple[dict[str, mx.array], mx.array]:
    """Gradients (draws, batch, ...) at the outputs of `names` and at the layer's input."""
    at_input: list[mx.array] = []
    at_names: dict[str, list[mx.array]] = {name: [] for name in names}
    for draw in g:
        start, inputs = 0, []
        outputs: dict[str, list[mx.array]] = {name: [] for name in names}
        for trace in traces:
            part = draw[start : start + len(trace.y)]
            start += len(trace.y)
            x, found = module.gradients(trace, part, names)
            inputs.append(x)
            for name in names:
                outputs[name].append(found[name])
        at_input.append(mx.concatenate(inputs))
        for name in names:
            at_names[name].append(mx.concatenate(outputs[name]))
    return {name: mx.stack(parts) for name, parts in at_names.items()}, mx.stack(at_input)


def _listener(found: Found) -> Callable[[str, mx.array, "mx.array | None"], None]:
    """Adds up squared inputs and counts, per expert where there are experts."""

    def listen(name: str, x: mx.array, indices: mx.array | None) -> None:
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
        found.importance[name] = _added(found.importance.get(name), np.array(total))
        found.seen[name] = _added(found.seen.get(name), count)

    return listen


def _added(before: np.ndarray | None, more: np.ndarray) -> np.ndarray:
    """The sum of two arrays of which one may know fewer experts."""
    if before is None:
        return more
    total = np.zeros((max(len(before), len(more)), *more.shape[1:]), more.dtype)
    total[: len(before)] += before
    total[: len(more)] += more
    return total
