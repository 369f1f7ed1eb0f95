"""The fisher profile: one pass forward, one back, a layer at a time.

Each step leaves its result in the work folder, so that an interrupted sweep goes on at the layer it
had reached. Several processes share the sequences; sums over them go through `mx.distributed`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from quantkit.backend import free_memory, mx
from quantkit.progress import Progress
from quantkit.sensitivity.entries import Entry, Key
from quantkit.sensitivity.probe import Found, predicted, probe_layer
from quantkit.sensitivity.work import ProfileWork
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.lm_head import ChangedModel, divergence, label_gradients
from quantkit.streaming.weight_loader import Call

EMBEDDING = "embedding"
HEAD = "head"


@dataclass(frozen=True)
class Table:
    """One step's results over all sequences: losses per entry and sequence, sums of squared inputs
    and counts of inputs per weight."""

    losses: dict[Key, np.ndarray]
    importance: dict[str, np.ndarray]
    seen: dict[str, np.ndarray]


class Sweep:
    """A fisher profile under way. `tokens` (sequences, length) are those of all processes."""

    def __init__(
        self,
        model: StreamingModel,
        tokens: np.ndarray,
        entries: Sequence[Entry],
        draws: int,
        seed: int,
        work: ProfileWork,
        rounding: str = "rtn",
    ) -> None:
        self.model = model
        self.entries = entries
        self.work = work
        self.rounding = rounding
        self.group = mx.distributed.init()
        self.sequences = len(tokens)
        self.mine = list(range(self.group.rank(), len(tokens), self.group.size()))
        self.tokens = mx.array(tokens[self.mine])
        keys = mx.random.split(mx.random.key(seed), len(tokens))
        levels = [mx.random.uniform(shape=(draws, tokens.shape[1]), key=keys[i]) for i in self.mine]
        self.levels = mx.stack(levels, axis=1)

    def run(self, progress: Progress) -> list[Table]:
        """Every step's table, in the order in which they were made."""
        self._forward(progress)
        steps: list[tuple[str, Callable[[Progress], Found]]] = [(HEAD, self._head)]
        for number in reversed(range(len(self.model.layers))):
            steps.append((f"layer-{number}", lambda p, n=number: self._layer(n, p)))  # type: ignore[misc]
        steps.append((EMBEDDING, self._embedding))
        tables = []
        done = self._agreed([name for name, _ in steps])
        for name, step in steps:
            if name not in done:
                started = time.monotonic()
                found = step(progress)
                self._keep(name, found, time.monotonic() - started)
                free_memory()
            else:
                progress(len(self._of(name)), name)
            tables.append(self._table(name))
        return tables

    def seconds(self) -> float:
        """The time that the steps took, those of interrupted runs included."""
        tables = sorted(self.work.folder.glob("*.json"))
        return float(sum(self.work.table(path.name)["seconds"] for path in tables))

    def _of(self, name: str) -> list[Entry]:
        """The entries that a step measures."""
        if name == EMBEDDING:
            return [e for e in self.entries if e.weight.name in self._embeddings]
        if name == HEAD:
            return [e for e in self.entries if e.weight.name == self.model.head_weight.name]
        number = int(name.removeprefix("layer-"))
        path = f"{self.model.layers[number].path}."
        return [e for e in self.entries if e.weight.name.startswith(path)]

    @property
    def _embeddings(self) -> set[str]:
        return {n for n, table in self.model.tables.items() if table.weight.role == "embedding"}

    def _forward(self, progress: Progress) -> None:
        if self._agreed(["h.npy"], ".npy"):
            progress(len(self.model.layers), "forward")
            return
        started = time.monotonic()

        def seen(number: int, call: Call, _y: mx.array) -> None:
            self.work.save_array(f"x-{number}.npy", call.x)
            progress(1, f"forward, layer {number}")

        h = self.model.run(self.tokens, seen)
        self.work.save_table("forward.json", {"seconds": time.monotonic() - started})
        self.work.save_array("h.npy", h)

    def _head(self, progress: Progress) -> Found:
        h = self.work.array("h.npy")
        progress(0, "gradients of the head")
        g = mx.stack(label_gradients(self.model, h, self.levels))
        found = Found(g=g)
        for entry in self._of(HEAD):
            (kl,) = divergence(self.model, h, [ChangedModel(h, entry.tier)])
            found.losses[entry.key] = np.array(kl.mean(axis=1), np.float32)
            progress(1, entry.weight.name)
        return found

    def _layer(self, number: int, progress: Progress) -> Found:
        layer = self.model.layers[number]
        before = f"layer-{number + 1}" if number + 1 < len(self.model.layers) else HEAD
        dry = self.model.calls(self.tokens[:1])[number]
        return probe_layer(
            layer,
            Call(self.work.array(f"x-{number}.npy"), dry.args, dry.kwargs),
            self.work.array(f"g-{before}.npy"),
            [w for n, w in self.model.weights.items() if n.startswith(f"{layer.path}.")],
            self._of(f"layer-{number}"),
            self.model.values,
            lambda name: progress(1, name),
            self.rounding,
        )

    def _embedding(self, progress: Progress) -> Found:
        found = Found()
        g = self.work.array("g-layer-0.npy")
        x = self.work.array("x-0.npy")
        for entry in self._of(EMBEDDING):
            moved = self.model.embedded(self.tokens, {entry.weight.name: entry.tier}) - x
            found.losses[entry.key] = predicted(iter([moved]), g)
            progress(1, entry.weight.name)
        return found

    def _keep(self, name: str, found: Found, seconds: float) -> None:
        """Reduce over all processes, and save: gradients first, the table last."""
        if found.g.size:
            self.work.save_array(f"g-{name}.npy", found.g)
        losses = {key: self._gathered(loss) for key, loss in found.losses.items()}
        arrays = {}
        for kind, sums in (("importance", found.importance), ("seen", found.seen)):
            for weight, values in sums.items():
                shape = self.model.weights[weight].shape
                whole = np.zeros((shape[0] if len(shape) > 2 else 1, *values.shape[1:]), np.float32)
                whole[: len(values)] = values
                arrays[f"{kind}.{weight}"] = np.array(self._summed(mx.array(whole)))
        self.work.save_arrays(f"{name}.npz", arrays)
        self.work.save_costs(f"{name}.json", losses, seconds)

    def _table(self, name: str) -> Table:
        sums: dict[str, dict[str, np.ndarray]] = {"importance": {}, "seen": {}}
        for key, values in self.work.arrays(f"{name}.npz").items():
            kind, _, weight = key.partition(".")
            sums[kind][weight] = values
        return Table(self.work.losses(f"{name}.json"), sums["importance"], sums["seen"])

    def _gathered(self, loss: np.ndarray) -> list[float]:
        """The losses of all sequences, in order, from all processes."""
        whole = np.zeros(self.sequences, np.float32)
        whole[self.mine] = loss
        values: list[float] = np.array(self._summed(mx.array(whole))).tolist()
        return values

    def _summed(self, values: mx.array) -> mx.array:
        if self.group.size() == 1:
            return values
        total = mx.distributed.all_sum(values, group=self.group, stream=mx.cpu)
        mx.eval(total)
        return total

    def _agreed(self, names: list[str], suffix: str = ".json") -> set[str]:
        """Those of the first `names` that every process has done."""
        done = 0
        for name in names:
            if not self.work.has(f"{name.removesuffix(suffix)}{suffix}"):
                break
            done += 1
        marks = mx.array([float(i < done) for i in range(len(names))])
        everywhere = np.array(self._summed(marks)) == self.group.size()
        return {name for name, there in zip(names, everywhere, strict=True) if there}
