"""The KL divergence of changed models, really measured: several sets of rounded weights at once.

The changed streams go through the layers together, so that each layer is loaded once for all.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from quantkit.backend import mx
from quantkit.formats.tiers import Tier
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import HookedLayer, hooked
from quantkit.streaming.lm_head import ChangedModel, divergence
from quantkit.streaming.weight_loader import Call

Tiers = Mapping[str, Tier]
"""Weight -> the tier it is rounded to; all that is not named is native."""

_TOGETHER = 1_000_000_000  # bytes of changed streams


def measured(
    model: StreamingModel, tokens: mx.array, changes: Sequence[Tiers], done: Callable[[int], None]
) -> list[np.ndarray]:
    """Mean KL divergence for every sequence of `tokens` (sequences, length), for each of `changes`.

    `done` is told the number of each one that is measured.
    """
    start = model.calls(tokens)
    model.run(tokens[:1], lambda *_: None)  # refuses models that cannot be driven layer by layer
    together = max(1, _TOGETHER // start[0].x.nbytes)
    found: list[np.ndarray] = []
    for first in range(0, len(changes), together):
        wave = changes[first : first + together]
        found += _wave(model, tokens, start, wave, lambda n, first=first: done(first + n))  # type: ignore[misc]
    return found


def _wave(
    model: StreamingModel,
    tokens: mx.array,
    start: Sequence[Call],
    changes: Sequence[Tiers],
    done: Callable[[int], None],
) -> list[np.ndarray]:
    x = start[0].x
    streams = _before_the_layers(model, tokens, changes)
    for layer, dry in zip(model.layers, start, strict=True):
        inside = f"{layer.path}."
        own = [[name for name in tiers if name.startswith(inside)] for tiers in changes]
        with hooked(layer, list(dict.fromkeys(name for names in own for name in names))) as module:
            for number, (tiers, names) in enumerate(zip(changes, own, strict=True)):
                if names or number in streams:
                    call = Call(streams.get(number, x), dry.args, dry.kwargs)
                    with ExitStack() as stack:
                        for name in names:
                            values = model.values(name)
                            stack.enter_context(module.changed(name, values, tiers[name]))
                        streams[number] = _through(module, call)
            x = _through(module, Call(x, dry.args, dry.kwargs))
    found = []
    for number, tiers in enumerate(changes):
        changed = ChangedModel(streams.get(number, x), tiers.get(model.head_weight.name))
        (kl,) = divergence(model, x, [changed])
        found.append(np.array(kl.mean(axis=1), np.float32))
        done(number)
    return found


def _through(module: HookedLayer, call: Call) -> mx.array:
    return mx.concatenate([module.run(part) for part in call.parts()])


def _before_the_layers(
    model: StreamingModel, tokens: mx.array, changes: Sequence[Tiers]
) -> dict[int, mx.array]:
    """The first layer's input under every change that rounds an embedding."""
    streams = {}
    names = [name for name, table in model.tables.items() if table.weight.role == "embedding"]
    for number, tiers in enumerate(changes):
        if own := {name: tiers[name] for name in names if name in tiers}:
            streams[number] = model.embedded(tokens, own)
    return streams
