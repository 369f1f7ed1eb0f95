"""The KL divergence of single changes, really measured: the whole model is run for each of them."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from quantkit.backend import mx
from quantkit.sensitivity.entries import Entry, Key
from quantkit.sensitivity.work import ProfileWork
from quantkit.streaming import measure_kl as joint
from quantkit.streaming.layer_runner import StreamingModel


def measured(
    model: StreamingModel,
    tokens: mx.array,
    entries: Sequence[Entry],
    done: Callable[[str], None],
) -> dict[Key, np.ndarray]:
    """Mean KL divergence of each entry for every sequence of `tokens` (sequences, length)."""
    order = {layer.path: number for number, layer in enumerate(model.layers)}
    waiting = sorted(entries, key=lambda entry: _layer(entry, order))
    losses = joint.measured(
        model,
        tokens,
        [{entry.weight.name: entry.tier} for entry in waiting],
        lambda number: done(waiting[number].weight.name),
    )
    return {entry.key: loss for entry, loss in zip(waiting, losses, strict=True)}


def measured_in_steps(
    model: StreamingModel,
    tokens: mx.array,
    entries: Sequence[Entry],
    work: ProfileWork,
    done: Callable[[str], None],
) -> tuple[dict[Key, np.ndarray], float]:
    """The same, one layer's entries after the other, each kept in `work` for an interrupted run to
    go on from; and the seconds that they took."""
    parts: dict[int | None, list[Entry]] = {}
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
            work.save_costs(name, rows, time.monotonic() - started)
        seconds += work.table(name)["seconds"]
        found |= work.losses(name)
    return found, seconds


def _layer(entry: Entry, order: dict[str, int]) -> int:
    return next((n for path, n in order.items() if entry.weight.name.startswith(f"{path}.")), -1)
