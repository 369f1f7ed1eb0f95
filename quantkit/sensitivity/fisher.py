"""The fisher profile: one forward and one backward pass, a layer at a time.

Each stage leaves its result in the work directory, so that an interrupted sweep resumes at its last
layer. Several processes share the sequences; sums over them go through `mx.distributed`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from quantkit.backend import free_memory, mx
from quantkit.backend.cpu_functions import row_dots
from quantkit.progress import Stage
from quantkit.quantizers.registry import RTN
from quantkit.sensitivity.entries import Entry, EntryKey
from quantkit.sensitivity.expert_probe import ExpertProbe
from quantkit.sensitivity.probe import LayerProbe, ProbeResult
from quantkit.sensitivity.quantizer_losses import (
    Losses,
    add_losses,
    head_losses,
    layer_losses,
    sampled_layers,
)
from quantkit.sensitivity.second_order import predicted_kl
from quantkit.sensitivity.work import ProfileWork
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.lm_head import ChangedModel, divergence, label_gradients
from quantkit.streaming.weight_loader import Call

# Stages: the head's is the number of layers, the last two have no layer.
EMBEDDING, LOSSES = -1, -2


@dataclass(frozen=True)
class StageTable:
    """The results of one stage over all sequences.

    `costs` (sequences,) are KL costs per entry, `importance` (experts, in) the sums of squared
    inputs, `seen` (experts,) the number of inputs, both by weight; `losses` are those of
    quantizers. `rankings` (experts,) are experts by block, best first, `removal` (sequences,) the
    KL costs of keeping so many of them.
    """

    costs: dict[EntryKey, np.ndarray]
    importance: dict[str, np.ndarray] = field(default_factory=dict)
    seen: dict[str, np.ndarray] = field(default_factory=dict)
    losses: Losses = field(default_factory=dict)
    rankings: dict[str, np.ndarray] = field(default_factory=dict)
    removal: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)


@dataclass
class Sweep:
    """A fisher profile in progress, over `tokens` (sequences, length) of all processes.

    On `more_tokens` (sequences, length), of which the first are `tokens`, quantizers are compared,
    unless they are None. `experts` ranks the experts of every layer, None if none is to be removed.
    """

    model: StreamingModel
    tokens: np.ndarray
    entries: Sequence[Entry]
    work: ProfileWork
    draws: int
    seed: int
    quantizer: str = RTN
    experts: ExpertProbe | None = None
    more_tokens: np.ndarray | None = None

    def __post_init__(self) -> None:
        self._group = mx.distributed.init()
        count = len(self.tokens)
        self._mine = list(range(self._group.rank(), count, self._group.size()))
        self._tokens = mx.array(self.tokens[self._mine])
        compared = None if self._group.rank() else self.more_tokens
        more = () if compared is None else range(len(compared))
        self._others = [i for i in more if i not in self._mine]
        self._other_tokens = None if compared is None else mx.array(compared[self._others])
        keys = mx.random.split(mx.random.key(self.seed), count)
        shape = (self.draws, self.tokens.shape[1])
        levels = [mx.random.uniform(shape=shape, key=keys[i]) for i in self._mine]
        self._levels = mx.stack(levels, axis=1)
        self._head = len(self.model.layers)

    def run(self, progress: Stage) -> list[StageTable]:
        """Run all stages, from the head down, and return their tables."""
        self._forward(progress)
        stages = list(range(self._head, LOSSES - 1, -1))
        done = self._agreed([f"stage-{number}.json" for number in stages])
        tables = []
        for number in stages:
            if f"stage-{number}.json" in done:
                progress(len(self._entries_of(number)), f"stage {number}")
            else:
                started = time.monotonic()
                result = self._run_stage(number, progress)
                self._save(number, result, time.monotonic() - started)
                free_memory()
            tables.append(self._table(number))
        return tables

    def seconds(self) -> float:
        """Return the time of all stages, those of interrupted runs included."""
        tables = sorted(self.work.folder.glob("*.json"))
        return float(sum(self.work.table(path.name)["seconds"] for path in tables))

    def _entries_of(self, number: int) -> list[Entry]:
        """Return the entries that a stage measures."""
        if number == LOSSES:
            return []
        if number == EMBEDDING:
            tables = self.model.tables.items()
            names = {name for name, table in tables if table.weight.role == "embedding"}
            return [entry for entry in self.entries if entry.weight.name in names]
        if number == self._head:
            name = self.model.head_weight.name
            return [entry for entry in self.entries if entry.weight.name == name]
        path = f"{self.model.layers[number].path}."
        return [entry for entry in self.entries if entry.weight.name.startswith(path)]

    def _forward(self, progress: Stage) -> None:
        if self._agreed(["h.npy"]):
            progress(len(self.model.layers), "forward")
            return
        started = time.monotonic()

        compared = sampled_layers(len(self.model.layers))

        def seen(number: int, call: Call, _y: mx.array) -> None:
            x = call.x if number in compared else call.x[: len(self._mine)]
            self.work.save_array(f"x-{number}.npy", x)
            progress(1, f"forward, layer {number}")

        tokens = self._tokens
        if self._other_tokens is not None:
            tokens = mx.concatenate([tokens, self._other_tokens])
        h = self.model.run(tokens, seen)
        self.work.save_table("forward.json", {"seconds": time.monotonic() - started})
        self.work.save_array("h.npy", h)

    def _run_stage(self, number: int, progress: Stage) -> ProbeResult:
        if number == EMBEDDING:
            return self._probe_embedding(progress)
        if number == LOSSES:
            return self._compare_quantizers(progress)
        if number == self._head:
            return self._probe_head(progress)
        layer = self.model.layers[number]
        weights = [w for n, w in self.model.weights.items() if n.startswith(f"{layer.path}.")]
        probe = LayerProbe(layer, weights, self.model.values, self.quantizer, self.experts)
        return probe.run(
            self._call(number, self._saved(f"x-{number}.npy")),
            self.work.array(f"g-{number + 1}.npy"),
            self._entries_of(number),
            lambda name: progress(1, name),
        )

    def _call(self, number: int, x: mx.array) -> Call:
        """Return the call of a layer for its input `x` (sequences, length, hidden)."""
        dry = self.model.calls(self._tokens[:1])[number]
        return Call(x, dry.args, dry.kwargs)

    def _saved(self, name: str) -> mx.array:
        """Read an array (sequences, ...) of the forward pass, for the sequences of this process."""
        return self.work.array(name)[: len(self._mine)]

    def _probe_head(self, progress: Stage) -> ProbeResult:
        h = self._saved("h.npy")
        progress(0, "gradients of the head")
        result = ProbeResult(g=mx.stack(label_gradients(self.model, h, self._levels)))
        entries = self._entries_of(self._head)
        changed = [ChangedModel(h, entry.tier) for entry in entries]
        for entry, kl in zip(entries, divergence(self.model, h, changed), strict=True):
            result.costs[entry.key] = np.array(kl.mean(axis=1), np.float32)
            progress(1, entry.weight.name)
        return result

    def _compare_quantizers(self, progress: Stage) -> ProbeResult:
        """Compare quantizers in the first process, on all sequences in their order."""
        if self._other_tokens is None:
            return ProbeResult()
        order = mx.argsort(mx.array(self._mine + self._others))
        losses: Losses = {}
        for number in sorted(sampled_layers(len(self.model.layers))):
            progress(0, f"quantizers on a sample, layer {number}")
            call = self._call(number, self.work.array(f"x-{number}.npy")[order])
            add_losses(losses, layer_losses(self.model, number, call, self.entries))
        add_losses(losses, head_losses(self.model, self.work.array("h.npy")[order], self.entries))
        return ProbeResult(losses=losses)

    def _probe_embedding(self, progress: Stage) -> ProbeResult:
        result = ProbeResult()
        g = self.work.array("g-0.npy")
        x = self._saved("x-0.npy")
        for entry in self._entries_of(EMBEDDING):
            moved = self.model.embedded(self._tokens, {entry.weight.name: entry.tier}) - x
            result.costs[entry.key] = predicted_kl(row_dots(g, moved))
            progress(1, entry.weight.name)
        return result

    def _save(self, number: int, result: ProbeResult, seconds: float) -> None:
        """Reduce over all processes, and save: gradients first, the table last."""
        if result.g.size:
            self.work.save_array(f"g-{number}.npy", result.g)
        costs = {key: self._gathered(kl) for key, kl in result.costs.items()}
        arrays = {}
        for kind, sums in (("importance", result.importance), ("seen", result.seen)):
            for weight, values in sums.items():
                shape = self.model.weights[weight].shape
                whole = np.zeros((shape[0] if len(shape) > 2 else 1, *values.shape[1:]), np.float32)
                whole[: len(values)] = values
                arrays[f"{kind}.{weight}"] = np.array(self._summed(mx.array(whole)))
        for key, loss in result.losses.items():
            arrays["losses." + "\t".join(key)] = np.array(loss)
        arrays |= {f"ranking.{block}": order for block, order in result.rankings.items()}
        for (block, count), kl in result.removal.items():
            arrays[f"removal.{block}\t{count}"] = kl
        self.work.save_arrays(f"stage-{number}.npz", arrays)
        self.work.save_costs(f"stage-{number}.json", costs, seconds)

    def _table(self, number: int) -> StageTable:
        kinds = ("importance", "seen", "losses", "ranking", "removal")
        arrays: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in kinds}
        for key, values in self.work.arrays(f"stage-{number}.npz").items():
            kind, _, name = key.partition(".")
            arrays[kind][name] = values
        losses: Losses = {}
        for key, loss in arrays["losses"].items():
            quantizer, role, tier = key.split("\t")
            losses[quantizer, role, tier] = float(loss)
        removal = {}
        for key, kl in arrays["removal"].items():
            block, count = key.split("\t")
            removal[block, int(count)] = kl
        return StageTable(
            self.work.costs(f"stage-{number}.json"),
            arrays["importance"],
            arrays["seen"],
            losses,
            arrays["ranking"],
            removal,
        )

    def _gathered(self, kl: np.ndarray) -> list[float]:
        """Return the KL costs of all sequences, in order, from all processes."""
        whole = np.zeros(len(self.tokens), np.float32)
        whole[self._mine] = kl
        values: list[float] = np.array(self._summed(mx.array(whole))).tolist()
        return values

    def _summed(self, values: mx.array) -> mx.array:
        if self._group.size() == 1:
            return values
        total = mx.distributed.all_sum(values, group=self._group, stream=mx.cpu)
        mx.eval(total)
        return total

    def _agreed(self, files: list[str]) -> set[str]:
        """Return the first of `files` that every process has."""
        done = 0
        while done < len(files) and self.work.has(files[done]):
            done += 1
        marks = mx.array([float(i < done) for i in range(len(files))])
        everywhere = np.array(self._summed(marks)) == self._group.size()
        return {name for name, complete in zip(files, everywhere, strict=True) if complete}
