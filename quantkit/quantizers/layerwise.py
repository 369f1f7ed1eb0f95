"""A plan's weights quantized stage by stage, from one pass of the native model.

Inputs come from the native model, not from the partly quantized one: by measurement that is as
good, and it makes the weights independent. The results of a stage wait on disk until their shard
is written, with the input of the next layer, so that a killed run resumes at its last layer.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from quantkit.artifacts.inventory import Weight
from quantkit.artifacts.plan import Plan
from quantkit.backend import free_memory, mx
from quantkit.backend.memory_limits import memory_limits
from quantkit.checkpoint.source import Source
from quantkit.errors import DamagedError, SourceError
from quantkit.formats.codec import to_numpy
from quantkit.formats.tiers import Tier, parse_tier
from quantkit.progress import Stage
from quantkit.quantizers.embeddings import drop_gradients, embedding_hessians
from quantkit.quantizers.hessians import (
    Hessians,
    Inputs,
    has_inputs,
    inputs_of,
    shared_inputs,
    stacked,
)
from quantkit.quantizers.layer_files import EMBEDDING, LayerFiles
from quantkit.quantizers.matrix import quantize_rows, scales_dtype
from quantkit.quantizers.registry import find_quantizer
from quantkit.storage.work_dir import Tensors
from quantkit.streaming.layer_runner import StreamingModel, has_gradients
from quantkit.streaming.layer_trace import hooked
from quantkit.streaming.weight_loader import Call

EMBEDDING_TOKENS = 4096  # to take gradients on
Done = dict[str, Tensors]


def changed_tiers(source: Source, plan: Plan, role: str | None = None) -> dict[str, Tier]:
    """Return weight -> tier where `plan` differs from the source, optionally for one role."""
    return {
        assignment.name: parse_tier(assignment.storage)
        for assignment in plan.assignments
        if assignment.storage != source.weights[assignment.name].storage
        and role in (None, assignment.role)
    }


@dataclass
class LayerwiseQuantizer:
    """Quantizes the affine weights of a plan, a stage at a time, on `tokens` (sequences, length).

    Left out, and so rounded to nearest by the writer: weights in other tiers, weights whose inputs
    are not known, and embeddings of models that mlx cannot differentiate.
    """

    model: StreamingModel
    plan: Plan
    tokens: mx.array
    files: LayerFiles
    progress: Stage

    def __post_init__(self) -> None:
        self._quantizer = find_quantizer(self.plan.quantizer)
        self._work = self.files.work
        differentiable = has_gradients(self.model.source)
        self.tiers = {
            name: tier
            for name, tier in changed_tiers(self.model.source, self.plan).items()
            if tier.mode == "affine"
            and (differentiable or self.model.weights[name].role != "embedding")
        }

    def stage_of(self, name: str) -> int | None:
        """Return the stage of a weight; None if it belongs to no layer, embedding or head."""
        for number, layer in enumerate(self.model.layers):
            if name.startswith(f"{layer.path}."):
                return number
        stages = {"lm_head": len(self.model.layers), "embedding": EMBEDDING}
        return stages.get(self.model.weights[name].role)

    def load(self, stage: int) -> Done:
        """Return the tensors of a stage, quantizing every stage before it that is missing."""
        if not self.files.has(stage):
            if stage == EMBEDDING:
                self._quantize_embedding()
            else:
                self._quantize_up_to(stage)
        return self.files.load(stage)

    def _quantize_up_to(self, last: int) -> None:
        reached = [n for n in range(1, last + 1) if self._work.has(f"x-{n}.npy")]
        first = max(reached, default=0)
        if first == 0:  # refuse models that cannot be driven layer by layer
            self.model.run(self.tokens[:1], lambda *_: None)
        for number in range(first, last + 1):
            done = (
                self._quantize_head()
                if number == len(self.model.layers)
                else self._quantize_layer(number)
            )
            self.files.save(number, done)
            self._work.drop(f"x-{number}.npy")
            self.progress(1, f"layer {number}")
            free_memory()

    def _quantize_layer(self, number: int) -> Done:
        """Quantize a layer, and save its native output for the next one."""
        layer = self.model.layers[number]
        weights = [w for n, w in self.model.weights.items() if n.startswith(f"{layer.path}.")]
        dry = self.model.calls(self.tokens[:1])[number]
        x = self._work.array(f"x-{number}.npy") if number else self.model.calls(self.tokens)[0].x
        with hooked(layer, [weight.name for weight in weights]) as module:
            call = Call(x, dry.args, dry.kwargs)
            traces = [module.record(batch) for batch in call.batches()]
        y = mx.concatenate([trace.y for trace in traces])
        if not mx.isfinite(y).all().item():
            raise SourceError(f"layer {number} ({layer.path}): its output is not finite.")
        calls = [[replace(step, y=trace.y) for step in trace.steps] for trace in traces]
        names = [w.name for w in weights if w.name in self.tiers and has_inputs(w, calls[0])]
        done: Done = {}
        for group in shared_inputs(names, calls[0]):
            done |= self._quantize_group(group, inputs_of(group[0], calls))
        self._work.save_array(f"x-{number + 1}.npy", y)
        return done

    def _quantize_group(self, names: Sequence[str], inputs: Inputs) -> Done:
        """Quantize weights with the same inputs, which share their Hessians."""
        weights = [self.model.weights[name] for name in names]
        values = [stacked(self.model.values(name)) for name in names]
        for name, stack in zip(names, values, strict=True):
            _require_finite(name, stack)
        slices: dict[str, list[Tensors]] = {name: [] for name in names}
        for experts, hessian in inputs.hessians(len(values[0])):
            hessians = Hessians(hessian)
            for weight, stack in zip(weights, values, strict=True):
                slices[weight.name].append(self._packed(weight, stack[experts], hessians))
                self.progress(0, weight.name)
            free_memory()
        return {name: _concatenated(tensors) for name, tensors in slices.items()}

    def _packed(self, weight: Weight, values: mx.array, hessians: Hessians) -> Tensors:
        tier, dtype = self.tiers[weight.name], scales_dtype(weight)
        chunk = values.astype(mx.float32)
        packed = quantize_rows(chunk, hessians, tier, self._quantizer, dtype).packed(tier)
        mx.eval(packed)
        return tuple(to_numpy(array) for array in packed)

    def _quantize_head(self) -> Done:
        head = self.model.head_weight
        if head.name not in self.tiers or head.role != "lm_head":
            return {}
        x = self.model.head_input(self._work.array(f"x-{len(self.model.layers)}.npy"))
        _, hessian = next(Inputs(x.reshape(-1, x.shape[-1]), None).hessians(1))
        return {head.name: self._quantize_table(head, hessian)}

    def _quantize_embedding(self) -> None:
        done: Done = {}
        tokens = self.tokens[: max(1, EMBEDDING_TOKENS // self.tokens.shape[1])]
        tables = {n: t.weight for n, t in self.model.tables.items() if n in self.tiers}
        names = [name for name, weight in tables.items() if weight.role == "embedding"]
        with suppress(RuntimeError, ValueError):  # mlx cannot differentiate every operation
            hessians = embedding_hessians(self.model, names, tokens, self._work, self.progress)
            for name, hessian in hessians.items():
                if hessian.any().item():
                    done[name] = self._quantize_table(tables[name], hessian[None])
        self.files.save(EMBEDDING, done)
        drop_gradients(self.model, self._work)
        self.progress(1, "embedding")

    def _quantize_table(self, weight: Weight, hessian: mx.array) -> Tensors:
        """Quantize a matrix as tall as the vocabulary under its `hessian` (1, in, in)."""
        hessians = Hessians(hessian)
        slices: list[Tensors] = []
        step = max(1, memory_limits().block_values // weight.shape[-1])
        for start in range(0, weight.shape[0], step):
            rows = self.model.values(weight.name, start, min(start + step, weight.shape[0]))
            _require_finite(weight.name, rows)
            slices.append(tuple(x[0] for x in self._packed(weight, rows[None], hessians)))
            self.progress(0, weight.name)
            free_memory()
        return _concatenated(slices)


def _concatenated(slices: Sequence[Tensors]) -> Tensors:
    return tuple(np.concatenate(column) for column in zip(*slices, strict=True))


def _require_finite(name: str, values: mx.array) -> None:
    if bad := values.size - int(np.array(mx.isfinite(values).sum())):
        raise DamagedError(
            f"{name}: {bad} of {values.size} values are NaN or infinite and cannot be "
            "quantized. The checkpoint is damaged: download it again."
        )
