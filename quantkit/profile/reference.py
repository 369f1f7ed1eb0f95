"""The KL divergence of single changes, really measured: the whole model is run for each of them.

The changed streams of many entries go through the layers together, so that each layer is loaded
once for all of them.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np

from quantkit.backend import mx
from quantkit.model.head import Changed, divergence
from quantkit.model.replay import TappedLayer, tapped
from quantkit.model.streamed import Call
from quantkit.model.streaming import StreamingModel
from quantkit.profile.candidates import Candidate, Key
from quantkit.profile.work import Work

_TOGETHER = 1_000_000_000  # bytes of changed streams


def measured(
    model: StreamingModel,
    tokens: mx.array,
    entries: Sequence[Candidate],
    done: Callable[[str], None],
) -> dict[Key, np.ndarray]:
    """Mean KL divergence of each entry for every sequence of `tokens` (sequences, length)."""
    start = model.calls(tokens)
    model.run(tokens[:1], lambda *_: None)  # refuses models that cannot be driven layer by layer
    together = max(1, _TOGETHER // start[0].x.nbytes)
    order = {layer.path: number for number, layer in enumerate(model.layers)}
    waiting = sorted(entries, key=lambda entry: _layer(entry, order))
    found: dict[Key, np.ndarray] = {}
    for first in range(0, len(waiting), together):
        wave = waiting[first : first + together]
        found |= _wave(model, tokens, start, wave, done)
    return found


def measured_in_steps(
    model: StreamingModel,
    tokens: mx.array,
    entries: Sequence[Candidate],
    work: Work,
    done: Callable[[str], None],
) -> tuple[dict[Key, np.ndarray], float]:
    """The same, one layer's entries after the other, each kept in `work` for an interrupted run to
    go on from; and the seconds that they took."""
    parts: dict[int | None, list[Candidate]] = {}
    for entry in entries:
        parts.setdefault(entry.weight.layer, []).append(entry)
    found: dict[Key, np.ndarray] = {}
    seconds = 0.0
    for layer, part in parts.items():
        name = f"measured-{layer}.json"
        if not work.has(name):
            started = time.monotonic()
            losses = measured(model, tokens, part, done)
            rows = {key: values.tolist() for key, values in losses.items()}
            work.save_losses(name, rows, time.monotonic() - started)
        seconds += work.table(name)["seconds"]
        found |= work.losses(name)
    return found, seconds


def _layer(entry: Candidate, order: dict[str, int]) -> int:
    return next((n for path, n in order.items() if entry.weight.name.startswith(f"{path}.")), -1)


def _wave(
    model: StreamingModel,
    tokens: mx.array,
    start: Sequence[Call],
    entries: Sequence[Candidate],
    done: Callable[[str], None],
) -> dict[Key, np.ndarray]:
    x = start[0].x
    streams = _before_the_layers(model, tokens, entries)
    for layer, dry in zip(model.layers, start, strict=True):
        own = [e for e in entries if e.weight.name.startswith(f"{layer.path}.")]
        names = list(dict.fromkeys(e.weight.name for e in own))
        with tapped(layer, names) as module:
            call = Call(x, dry.args, dry.kwargs)
            for key, h in streams.items():
                streams[key] = _through(module, Call(h, dry.args, dry.kwargs))
            for entry in own:
                with module.changed(entry.weight.name, model.values(entry.weight.name), entry.tier):
                    streams[entry.key] = _through(module, call)
            x = _through(module, call)
    found = {}
    heads = {model.head_weight.name}
    for entry in entries:
        tier = entry.tier if entry.weight.name in heads else None
        (kl,) = divergence(model, x, [Changed(streams.get(entry.key, x), tier)])
        found[entry.key] = np.array(kl.mean(axis=1), np.float32)
        done(entry.weight.name)
    return found


def _through(module: TappedLayer, call: Call) -> mx.array:
    parts = [module.run(part) for part in call.parts()]
    return mx.concatenate(parts)


def _before_the_layers(
    model: StreamingModel, tokens: mx.array, entries: Sequence[Candidate]
) -> dict[Key, mx.array]:
    """The first layer's input under every entry that changes an embedding."""
    streams = {}
    for entry in entries:
        table = model.tables.get(entry.weight.name)
        if table is not None and table.weight.role == "embedding":
            streams[entry.key] = model.embedded(tokens, entry.weight.name, entry.tier)
    return streams
