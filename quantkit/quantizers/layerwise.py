"""A plan's weights rounded one layer after the other, from one pass of the native model.

Inputs come from the native model, not from the one that is being quantized: measured, that is as
good, and so every weight is rounded by itself. A layer's results wait on disk until its shard is
written, with the input of the layer after it, so that a killed run goes on at the layer it had
reached.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.artifacts.plan import Plan
from quantkit.backend import free_memory, mx
from quantkit.errors import DamagedError, SourceError
from quantkit.formats.codec import to_numpy
from quantkit.formats.tiers import parse_tier
from quantkit.progress import Progress
from quantkit.quantizers.embeddings import drop_gradients, embedding_hessians
from quantkit.quantizers.hessians import Inputs, has_inputs, inputs_of, shared_inputs, stacked
from quantkit.quantizers.rounding import Hessians, rounded_under, stored_float
from quantkit.quantizers.scale_tuning import Tuner, Tuning
from quantkit.storage.work_dir import Tensors, WorkDirectory
from quantkit.streaming.layer_runner import StreamingModel, has_gradients
from quantkit.streaming.layer_trace import hooked
from quantkit.streaming.weight_loader import Call

_EMBEDDING = "rounded-embedding"
EMBEDDING_TOKENS = 4096  # to take gradients on
_AT_ONCE = 32_000_000  # values of a table


@dataclass(frozen=True)
class RoundingText:
    """Token ids (sequences, length): those to round on, those to tune on, and those that decide
    which point of tuning is kept."""

    tokens: np.ndarray
    tuned: np.ndarray
    validation: np.ndarray


class LayerRounder:
    """Gives the tensors of `plan`'s weights, rounded and tuned as it says, on `text`.

    Weights are asked for in the order of the model. What is not of an affine tier, or no input is
    known of, is not given, nor an embedding where there are no gradients: it is rounded to nearest.
    """

    def __init__(
        self,
        model: StreamingModel,
        plan: Plan,
        text: RoundingText,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._model = model
        self._method = plan.rounding
        self._tokens = mx.array(text.tokens)
        self._work = WorkDirectory(folder)
        self._progress = progress
        changed = {
            choice.name: parse_tier(choice.storage)
            for choice in plan.choices
            if choice.storage != model.weights[choice.name].storage
        }
        self._tiers = {
            name: tier
            for name, tier in changed.items()
            if tier.mode == "affine"
            and (model.weights[name].role != "embedding" or has_gradients(model.source))
        }
        self._tuner = None
        if plan.tuning_steps:
            self._tuner = Tuner(
                model,
                changed,
                lambda number: self._load(f"rounded-{number}"),
                Tuning(plan.tuning_steps),
                text.tuned,
                text.validation,
                self._work,
                progress,
            )
        self._tuned = False
        self._written: set[str] = set()
        self._held: tuple[str, dict[str, Tensors]] = ("", {})

    def __call__(self, name: str) -> Tensors | None:
        """The tensors of a weight; None for one to be rounded to nearest."""
        if name not in self._tiers:
            return None
        step = self._step_of(name)
        if step is None:
            return None
        if self._held[0] != step:
            self._held = (step, self._made(step))
        return self._held[1].get(name)

    def _step_of(self, name: str) -> str | None:
        """The step in which a weight is rounded: its layer's, the head's, or the embedding's."""
        for number, layer in enumerate(self._model.layers):
            if name.startswith(f"{layer.path}."):
                return f"rounded-{number}"
        steps = {"lm_head": "rounded-head", "embedding": _EMBEDDING}
        return steps.get(self._model.weights[name].role)

    def _made(self, step: str) -> dict[str, Tensors]:
        """A step's tensors, tuned where they are to be."""
        if self._tuner is None or step == _EMBEDDING:
            return self._load(step)
        if not self._tuned:
            self._load("rounded-head")  # all layers before it
            self._tuner.run()
            self._tuned = True
        if step == "rounded-head":
            return self._load(step)
        return self._tuner.tensors(int(step.split("-")[1]))

    def _load(self, step: str) -> dict[str, Tensors]:
        if step == _EMBEDDING and not self._work.has(f"{step}.npz"):
            self._round_embedding()
        if not self._work.has(f"{step}.npz"):
            last = len(self._model.layers) if step == "rounded-head" else int(step.split("-")[1])
            first = self._reached(last)
            if first == 0:  # refuses models that cannot be driven layer by layer
                self._model.run(self._tokens[:1], lambda *_: None)
            for number in range(first, last + 1):
                self._round(number)
        found: dict[str, dict[int, np.ndarray]] = {}
        for key, values in self._work.arrays(f"{step}.npz").items():
            place, _, name = key.partition(" ")
            found.setdefault(name, {})[int(place)] = values
        return {name: tuple(parts[i] for i in sorted(parts)) for name, parts in found.items()}

    def _reached(self, wanted: int) -> int:
        """The last layer, up to `wanted`, whose input is known."""
        known = [n for n in range(1, wanted + 1) if self._work.has(f"x-{n}.npy")]
        return max(known, default=0)

    def _round(self, number: int) -> None:
        """Round a layer, and leave its output for the next; after the last one the head."""
        layers = self._model.layers
        done: dict[str, Tensors] = {}
        if number == len(layers):
            self._round_head(done)
            step = "rounded-head"
        else:
            step = f"rounded-{number}"
            dry = self._model.calls(self._tokens[:1])[number]
            x = self._work.array(f"x-{number}.npy") if number else self._embedded()
            layer = layers[number]
            own = [w for n, w in self._model.weights.items() if n.startswith(f"{layer.path}.")]
            with hooked(layer, [w.name for w in own]) as module:
                call = Call(x, dry.args, dry.kwargs)
                traces = [module.record(part) for part in call.parts()]
            y = mx.concatenate([trace.y for trace in traces])
            if not mx.isfinite(y).all().item():
                raise SourceError(f"layer {number} ({layer.path}): its output is not finite.")
            steps = [[replace(step, y=trace.y) for step in trace.steps] for trace in traces]
            wanted = [w.name for w in own if w.name in self._tiers and has_inputs(w, steps[0])]
            for group in shared_inputs(wanted, steps[0]):
                self._round_group(group, inputs_of(group[0], steps), done)
            self._work.save_array(f"x-{number + 1}.npy", y)
        self._keep(step, done)
        self._work.drop(f"x-{number}.npy")
        free_memory()

    def _embedded(self) -> mx.array:
        return self._model.calls(self._tokens)[0].x

    def _round_embedding(self) -> None:
        done: dict[str, Tensors] = {}
        count = max(1, EMBEDDING_TOKENS // self._tokens.shape[1])
        tokens = self._tokens[:count]
        tables = {name: t.weight for name, t in self._model.tables.items() if name in self._tiers}
        names = [name for name, weight in tables.items() if weight.role == "embedding"]
        with suppress(RuntimeError, ValueError):  # mlx does not differentiate all that it runs
            found = embedding_hessians(self._model, names, tokens, self._work, self._progress)
            for name, hessian in found.items():
                if hessian.any().item():
                    self._round_table(tables[name], hessian, done)
        self._keep(_EMBEDDING, done)
        drop_gradients(self._model, self._work)

    def _round_table(self, weight: Weight, hessian: mx.array, done: dict[str, Tensors]) -> None:
        """A matrix as tall as the vocabulary, some rows at a time."""
        hessians, tier = Hessians(hessian[None]), self._tiers[weight.name]
        parts: list[Tensors] = []
        step = max(1, _AT_ONCE // weight.shape[-1])
        for start in range(0, weight.shape[0], step):
            rows = self._model.values(weight.name, start, min(start + step, weight.shape[0]))
            self._require_finite(weight.name, rows)
            some = rows.astype(mx.float32)[None]
            made = rounded_under(some, hessians, tier, self._method, stored_float(weight))
            packed = made.packed(tier)
            mx.eval(packed)
            parts.append(tuple(to_numpy(array)[0] for array in packed))
            self._progress(0, weight.name)
            free_memory()
        columns = zip(*parts, strict=True)
        done[weight.name] = tuple(np.concatenate(column) for column in columns)

    def _require_finite(self, name: str, values: mx.array) -> None:
        if bad := values.size - int(np.array(mx.isfinite(values).sum())):
            raise DamagedError(
                f"{name}: {bad} of {values.size} values are NaN or infinite and cannot be "
                "quantized. The checkpoint is damaged: download it again."
            )

    def _round_head(self, done: dict[str, Tensors]) -> None:
        head = self._model.head_weight
        if head.name in self._tiers and head.role == "lm_head":
            h = self._work.array(f"x-{len(self._model.layers)}.npy")
            x = self._model.head_input(h)
            for _, hessian in Inputs(x.reshape(-1, x.shape[-1]), None).hessians(1):
                self._round_table(head, hessian[0], done)

    def _round_group(self, names: Sequence[str], inputs: Inputs, done: dict[str, Tensors]) -> None:
        """Weights that see the same inputs."""
        weights = [self._model.weights[name] for name in names]
        values = [stacked(self._model.values(name)) for name in names]
        for name, stack in zip(names, values, strict=True):
            self._require_finite(name, stack)
        parts: dict[str, list[Tensors]] = {name: [] for name in names}
        for some, hessian in inputs.hessians(len(values[0])):
            hessians = Hessians(hessian)
            for weight, stack in zip(weights, values, strict=True):
                tier = self._tiers[weight.name]
                chunk = stack[some].astype(mx.float32)
                dtype = stored_float(weight)
                packed = rounded_under(chunk, hessians, tier, self._method, dtype).packed(tier)
                mx.eval(packed)
                parts[weight.name].append(tuple(to_numpy(array) for array in packed))
                self._progress(0, weight.name)
            free_memory()
        for name, found in parts.items():
            columns = (np.concatenate(column) for column in zip(*found, strict=True))
            done[name] = tuple(columns)

    def _keep(self, step: str, done: Mapping[str, Tensors]) -> None:
        arrays = {
            f"{i} {name}": values for name, parts in done.items() for i, values in enumerate(parts)
        }
        self._work.save_arrays(f"{step}.npz", arrays)

    def written(self, weights: Sequence[str]) -> None:
        """Those weights are in a finished shard: what waited of them may go."""
        mine = [name for name in weights if name in self._tiers]
        self._written |= set(mine)
        for step in {step for name in mine if (step := self._step_of(name))}:
            own = {name for name in self._tiers if self._step_of(name) == step}
            if own <= self._written:
                self._work.drop(f"{step}.npz")
                number = step.removeprefix("rounded-")
                for parity in (0, 1):  # the best point stays, for a shard that is found damaged
                    self._work.drop(f"tune-{number}-{parity}.npz")
