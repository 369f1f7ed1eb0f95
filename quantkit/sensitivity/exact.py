"""The measured KL divergence of single changes: the whole model runs for each of them."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from quantkit.backend import mx
from quantkit.sensitivity.entries import Entry, EntryKey
from quantkit.sensitivity.work import ProfileWork
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.measure_kl import measure_kl


def measure_entries(
    model: StreamingModel,
    tokens: mx.array,
    entries: Sequence[Entry],
    done: Callable[[str], None],
) -> dict[EntryKey, np.ndarray]:
    """Return the mean KL divergence (sequences,) of each entry, on tokens (sequences, length)."""
    order = {layer.path: number for number, layer in enumerate(model.layers)}
    ordered = sorted(entries, key=lambda entry: _layer(entry, order))
    divergences = measure_kl(
        model,
        tokens,
        [{entry.weight.name: entry.tier} for entry in ordered],
        lambda number: done(ordered[number].weight.name),
    )
    return {entry.key: kl for entry, kl in zip(ordered, divergences, strict=True)}


def measure_resumably(
    model: StreamingModel,
    tokens: mx.array,
    entries: Sequence[Entry],
    work: ProfileWork,
    done: Callable[[str], None],
) -> tuple[dict[EntryKey, np.ndarray], float]:
    """Measure one layer's entries after the other, and save each layer's results in `work`.

    `tokens` are (sequences, length). Returns the mean KL divergences (sequences,) by entry, and the
    seconds of the measurements, those of interrupted runs included.
    """
    by_layer: dict[int | None, list[Entry]] = {}
    for entry in entries:
        by_layer.setdefault(entry.weight.layer, []).append(entry)
    divergences: dict[EntryKey, np.ndarray] = {}
    seconds = 0.0
    for layer, in_layer in by_layer.items():
        name = f"measured-{layer}.json"
        if not work.has(name):
            started = time.monotonic()
            measured = measure_entries(model, tokens, in_layer, done)
            rows = {key: values.tolist() for key, values in measured.items()}
            work.save_costs(name, rows, time.monotonic() - started)
        seconds += work.table(name)["seconds"]
        divergences |= work.costs(name)
    return divergences, seconds


def _layer(entry: Entry, order: dict[str, int]) -> int:
    return next((n for path, n in order.items() if entry.weight.name.startswith(f"{path}.")), -1)
