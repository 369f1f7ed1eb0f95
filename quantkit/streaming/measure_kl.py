"""Measure the KL divergence of several changed models at once.

Their streams pass through the layers together, so that each layer is loaded once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from quantkit.artifacts.experts import expert_blocks
from quantkit.backend import mx
from quantkit.backend.memory_limits import memory_limits
from quantkit.formats.tiers import Tier
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import HookedLayer, hooked
from quantkit.streaming.lm_head import ChangedModel, divergence
from quantkit.streaming.routing import block_in_layer
from quantkit.streaming.weight_loader import Call

Tiers = Mapping[str, Tier]
"""Weight -> the tier that it is rounded to; other weights stay native."""
RemovedExperts = Mapping[str, Sequence[int]]
"""Block -> the numbers of the experts to remove from it."""


def measure_kl(
    model: StreamingModel,
    tokens: mx.array,
    changes: Sequence[Tiers],
    done: Callable[[int], None],
    removed: Sequence[RemovedExperts] = (),
) -> list[np.ndarray]:
    """Return the mean KL divergence of every sequence, an array (sequences,) for each of `changes`.

    `tokens` are (sequences, length). `removed` are the experts that each change removes, empty if
    none does. `done` receives the number of each measured change.
    """
    removed = removed or [{} for _ in changes]
    model.require_layerwise(tokens)
    start = model.calls(tokens)
    together = max(1, memory_limits().stream_bytes // start[0].x.nbytes)
    divergences: list[np.ndarray] = []
    for first in range(0, len(changes), together):
        some = slice(first, first + together)
        wave = list(zip(changes[some], removed[some], strict=True))
        divergences += _wave(model, tokens, start, wave, lambda n, first=first: done(first + n))  # type: ignore[misc]
    return divergences


def _wave(
    model: StreamingModel,
    tokens: mx.array,
    start: Sequence[Call],
    changes: Sequence[tuple[Tiers, RemovedExperts]],
    done: Callable[[int], None],
) -> list[np.ndarray]:
    x = start[0].x
    tiers_of = [tiers for tiers, _ in changes]
    streams = _before_the_layers(model, tokens, tiers_of)
    blocks = expert_blocks(model.source.inventory) if any(gone for _, gone in changes) else {}
    for layer, dry in zip(model.layers, start, strict=True):
        inside = f"{layer.path}."
        in_layer = [[name for name in tiers if name.startswith(inside)] for tiers in tiers_of]
        with hooked(
            layer, list(dict.fromkeys(name for names in in_layer for name in names))
        ) as module:
            for number, (tiers, gone) in enumerate(changes):
                names = in_layer[number]
                less = [block for block in gone if block.startswith(inside)]
                if names or less or number in streams:
                    call = Call(streams.get(number, x), dry.args, dry.kwargs)
                    with ExitStack() as stack:
                        for name in names:
                            stack.enter_context(
                                module.changed(name, model.values(name), tiers[name])
                            )
                        for block in less:
                            routed = block_in_layer(module.module, layer.path, block, blocks[block])
                            stack.enter_context(routed.without(gone[block]))
                        streams[number] = _through(module, call)
            x = _through(module, Call(x, dry.args, dry.kwargs))
    divergences: list[np.ndarray] = []
    heads = [tiers.get(model.head_weight.name) for tiers in tiers_of]
    changed = [ChangedModel(streams.get(number, x), tier) for number, tier in enumerate(heads)]
    for number, kl in enumerate(divergence(model, x, changed)):
        divergences.append(np.array(kl.mean(axis=1), np.float32))
        done(number)
    return divergences


def _through(module: HookedLayer, call: Call) -> mx.array:
    return mx.concatenate([module.run(batch) for batch in call.batches()])


def _before_the_layers(
    model: StreamingModel, tokens: mx.array, changes: Sequence[Tiers]
) -> dict[int, mx.array]:
    """Return the first layer's input for every change that rounds an embedding."""
    streams = {}
    names = [name for name, table in model.tables.items() if table.weight.role == "embedding"]
    for number, tiers in enumerate(changes):
        if in_layer := {name: tiers[name] for name in names if name in tiers}:
            streams[number] = model.embedded(tokens, in_layer)
    return streams
