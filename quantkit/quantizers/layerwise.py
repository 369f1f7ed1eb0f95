"""A plan's weights quantized stage by stage, from one pass of the native model.

Inputs of a layer come from the native model, not from the partly quantized one: by measurement that
is better, and it makes the layers independent. Within a block (attention, the experts or the MLP)
errors propagate: the last projection is quantized on the inputs that it gets from the quantized
weights before it, towards its native outputs. The results of a stage wait on disk until their shard
is written, with the input of the next layer, so that a killed run resumes at its last layer.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from quantkit.artifacts.calibration import ExpertInputs
from quantkit.artifacts.inventory import Weight
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.roles import ATTENTION_ROLES, EXPERT_ROLES, MLP_ROLES
from quantkit.backend import free_memory, mx
from quantkit.backend.memory_limits import memory_limits
from quantkit.checkpoint.source import Source
from quantkit.errors import SourceError
from quantkit.formats.codec import to_mx, to_numpy
from quantkit.formats.tiers import Tier, parse_tier
from quantkit.progress import Stage
from quantkit.quantizers.choose_prior import Sample, choose, sampled_matrices
from quantkit.quantizers.embeddings import drop_gradients, embedding_hessians
from quantkit.quantizers.hessians import DEFAULT_PRIOR, Hessians, shrunk, stacked
from quantkit.quantizers.input_sums import (
    DiskSpool,
    Inputs,
    InputSums,
    has_inputs,
    shared_inputs,
)
from quantkit.quantizers.layer_files import EMBEDDING, LayerFiles
from quantkit.quantizers.matrix import quantize_rows, require_finite, scales_dtype
from quantkit.quantizers.registry import Quantizer, find_quantizer
from quantkit.storage.work_dir import Tensors, WorkDirectory
from quantkit.streaming.layer_runner import StreamingModel, has_gradients
from quantkit.streaming.layer_trace import HookedLayer, LayerTrace, ModuleCall, hooked
from quantkit.streaming.products import Product, packed_product
from quantkit.streaming.weight_loader import Call

EMBEDDING_TOKENS = 4096  # to take gradients on
_HEAD_ROWS = 16384  # of a head, to choose its prior
_OUTPUT = "y.npy"  # of the layer at work
_COVERAGE = "coverage-{}.json"
_BLOCKS = (ATTENTION_ROLES, EXPERT_ROLES, MLP_ROLES)
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
class SharedInputs:
    """The inputs that the weights `names` share: sums to calibrate, and to validate on.

    At `level` 0 they are native. At a higher one they come from the quantized weights of lower
    levels, and stand for native ones.
    """

    names: Sequence[str]
    level: int
    inputs: InputSums
    validation: InputSums
    spool: DiskSpool

    @classmethod
    def of(
        cls, names: Sequence[str], level: int, first: Weight, work: WorkDirectory
    ) -> "SharedInputs":
        """Begin empty sums for weights of the shape of `first`."""
        matrices = first.shape[0] if len(first.shape) > 2 else 1
        spool = DiskSpool(work.folder / f"inputs-{names[0]}.f32")
        validation = InputSums(matrices, only=sampled_matrices(matrices))
        return cls(names, level, InputSums(matrices, spool), validation, spool)

    def add(self, call: ModuleCall, calibrates: bool, native: ModuleCall | None = None) -> None:
        """Add the inputs of a call of the first weight, and those of the `native` call."""
        sums = self.inputs if calibrates else self.validation
        sums.add(Inputs.of(call.args), None if native is None else Inputs.of(native.args).x)


@dataclass
class LayerwiseQuantizer:
    """Quantizes the affine weights of a plan, a stage at a time, on `tokens` (sequences, length).

    The first `calibrating` sequences make the Hessians, the others validate their priors.

    Left out, and so rounded to nearest by the writer: weights in other tiers, weights whose inputs
    are not known, and embeddings of models that mlx cannot differentiate.
    """

    model: StreamingModel
    plan: Plan
    tokens: mx.array
    calibrating: int
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
        if first == 0:
            self.model.require_layerwise(self.tokens)
        for number in range(first, last + 1):
            if number == len(self.model.layers):
                self.files.save(number, self._quantize_head())
            else:
                self.files.save(number, self._quantize_layer(number))
                self._work.rename(_OUTPUT, f"x-{number + 1}.npy")
            self._work.drop(f"x-{number}.npy")
            self.progress(1, f"layer {number}")
            free_memory()

    def _quantize_layer(self, number: int) -> Done:
        """Quantize a layer; its native output is the next one's input."""
        groups = self._read_native_inputs(number)
        done: Done = {}
        coverage: dict[str, dict[str, Any]] = {}
        for level in range(1 + max((group.level for group in groups), default=0)):
            of_level = [group for group in groups if group.level == level]
            if level > 0:
                self._read_changed_inputs(number, of_level, done)
            for group in of_level:
                done |= self._quantize_group(group)
                if len(group.inputs.counts) > 1:
                    first = self.model.weights[group.names[0]]
                    inputs = ExpertInputs.of(group.inputs.counts, first)
                    coverage |= {name: asdict(inputs) for name in group.names}
                group.spool.remove()
        self._work.save_table(_COVERAGE.format(number), coverage)
        return done

    def expert_inputs(self) -> dict[str, ExpertInputs]:
        """Return how many inputs the experts of each quantized stack had."""
        names = map(_COVERAGE.format, range(len(self.model.layers)))
        tables = [self._work.table(name) for name in names if self._work.has(name)]
        return {name: ExpertInputs(**row) for table in tables for name, row in table.items()}

    def _read_native_inputs(self, number: int) -> list[SharedInputs]:
        """Run the layer on all text, a chunk at a time, and group its weights by their inputs.

        Sum up the inputs of the groups at level 0.
        """
        groups: list[SharedInputs] = []
        shape = (*self.tokens.shape, self.model.calls(self.tokens[:1])[0].x.shape[-1])
        with self._work.array_writer(_OUTPUT, shape) as write:
            for _, trace, calibrates in self._traces(number):
                if not mx.isfinite(trace.y).all().item():
                    path = self.model.layers[number].path
                    raise SourceError(f"layer {number} ({path}): its output is not finite.")
                write(trace.y)
                steps = [replace(step, y=trace.y) for step in trace.steps]
                del trace  # and with it the outputs of all modules
                groups = groups or self._groups(steps)
                for group in groups:
                    for step in steps:
                        if group.level == 0 and step.name == group.names[0]:
                            group.add(step, calibrates)
        return groups

    def _read_changed_inputs(
        self, number: int, groups: Sequence[SharedInputs], done: Mapping[str, Tensors]
    ) -> None:
        """Sum up the inputs of groups behind quantized weights of their blocks."""
        weights = self.model.weights  # a quantized router would send tokens to other experts
        within = [name for name in done if any(weights[name].role in roles for roles in _BLOCKS)]
        products = {name: self._product(name, done[name]) for name in within}
        names = {group.names[0]: group for group in groups}
        for module, trace, calibrates in self._traces(number):
            for native, call in module.replay(trace, products, names):
                names[call.name].add(call, calibrates, native)

    def _traces(self, number: int) -> Iterator[tuple[HookedLayer, LayerTrace, bool]]:
        """Run the layer on chunks of text; yield each run, and whether its text calibrates."""
        layer = self.model.layers[number]
        names = [name for name in self.model.weights if name.startswith(f"{layer.path}.")]
        dry = self.model.calls(self.tokens[:1])[number]
        with hooked(layer, names) as module:
            for chunk, calibrates in self._chunks():
                call = Call(self._input(number, chunk), dry.args, dry.kwargs)
                yield module, module.record(call), calibrates
                self.progress(0, f"layer {number}: inputs of {chunk.stop} sequences")

    def _groups(self, steps: Sequence[ModuleCall]) -> list[SharedInputs]:
        """Group the weights to quantize, in the order of their calls, by their inputs."""
        weights = self.model.weights
        names = [step.name for step in steps if step.name in self.tiers]
        named = [name for name in dict.fromkeys(names) if has_inputs(weights[name], steps)]
        levels: Counter[int] = Counter()  # of the next group, by block
        groups = []
        for group in shared_inputs(named, steps):
            first = weights[group[0]]
            block = next((i for i, roles in enumerate(_BLOCKS) if first.role in roles), None)
            level = 0 if block is None else levels[block]
            groups.append(SharedInputs.of(group, level, first, self._work))
            if block is not None:
                levels[block] += 1
        return groups

    def _product(self, name: str, stored: Tensors) -> Product:
        """Return the product with a quantized weight."""
        weight = self.model.weights[name]
        packed, *scales = (array.reshape(*weight.shape[:-1], -1) for array in stored)
        tensors = [mx.array(packed), *(to_mx(array, weight.dtype) for array in scales)]
        return packed_product(tensors, self.tiers[name])

    def _chunks(self) -> Iterator[tuple[slice, bool]]:
        """Yield sequences that a layer takes at once, and whether they calibrate."""
        step = max(1, memory_limits().tokens // self.tokens.shape[1])
        for start, stop in ((0, self.calibrating), (self.calibrating, len(self.tokens))):
            for first in range(start, stop, step):
                yield slice(first, min(first + step, stop)), start == 0

    def _input(self, number: int, chunk: slice) -> mx.array:
        """Return a layer's input (sequences, length, hidden) for some sequences."""
        if number == 0:
            return self.model.calls(self.tokens[chunk])[0].x
        return self._work.array_rows(f"x-{number}.npy", chunk.start, chunk.stop)

    def _quantize_group(self, group: SharedInputs) -> Done:
        """Quantize weights with the same inputs, which share their Hessians."""
        weights = [self.model.weights[name] for name in group.names]
        values = [stacked(self.model.values(name)) for name in group.names]
        for name, stack in zip(group.names, values, strict=True):
            require_finite(name, stack)
        samples = [
            Sample(stack, self.tiers[weight.name], scales_dtype(weight))
            for weight, stack in zip(weights, values, strict=True)
        ]
        choice = choose(samples, group.inputs, group.validation, self._quantizer)
        slices: dict[str, list[Tensors]] = {name: [] for name in group.names}
        for experts, moments in group.inputs.moments(choice.prior):
            hessians = Hessians(moments)
            for alike in self._alike(weights):
                rows = mx.concatenate([values[i][experts] for i in alike], axis=-2)
                packed = self._packed(weights[alike[0]], rows, hessians, choice.quantizer)
                ends = np.cumsum([values[i].shape[-2] for i in alike])[:-1]
                columns = zip(*(np.split(tensor, ends, axis=-2) for tensor in packed), strict=True)
                for i, tensors in zip(alike, columns, strict=True):
                    slices[weights[i].name].append(tensors)
                    self.progress(0, weights[i].name)
            free_memory()
        return {name: _concatenated(tensors) for name, tensors in slices.items()}

    def _alike(self, weights: Sequence[Weight]) -> list[list[int]]:
        """Return the numbers of the weights that are quantized at once, as rows of one matrix."""
        alike: dict[tuple[Tier, str], list[int]] = {}
        for number, weight in enumerate(weights):
            alike.setdefault((self.tiers[weight.name], weight.dtype), []).append(number)
        return list(alike.values())

    def _packed(
        self, weight: Weight, values: mx.array, hessians: Hessians, quantizer: Quantizer
    ) -> Tensors:
        tier, dtype = self.tiers[weight.name], scales_dtype(weight)
        chunk = values.astype(mx.float32)
        packed = quantize_rows(chunk, hessians, tier, quantizer, dtype).packed(tier)
        mx.eval(packed)
        return tuple(to_numpy(array) for array in packed)

    def _quantize_head(self) -> Done:
        head = self.model.head_weight
        if head.name not in self.tiers or head.role != "lm_head":
            return {}
        group = SharedInputs.of([head.name], 0, head, self._work)
        for chunk, calibrates in self._chunks():
            x = self.model.head_input(self._input(len(self.model.layers), chunk))
            group.add(ModuleCall(head.name, (x,), x), calibrates)
        rows = self.model.values(head.name, 0, min(_HEAD_ROWS, head.shape[0]))
        sample = Sample(rows[None], self.tiers[head.name], scales_dtype(head))
        choice = choose([sample], group.inputs, group.validation, self._quantizer)
        ((_, moments),) = group.inputs.moments(choice.prior)
        return {head.name: self._quantize_table(head, moments, choice.quantizer)}

    def _quantize_embedding(self) -> None:
        done: Done = {}
        count = max(1, EMBEDDING_TOKENS // self.tokens.shape[1])
        tokens = self.tokens[: min(count, self.calibrating)]
        tables = {n: t.weight for n, t in self.model.tables.items() if n in self.tiers}
        names = [name for name, weight in tables.items() if weight.role == "embedding"]
        hessians: dict[str, mx.array] = {}
        with suppress(RuntimeError, ValueError):  # mlx cannot differentiate every operation
            if names:
                hessians = embedding_hessians(self.model, names, tokens, self._work, self.progress)
        for name, hessian in hessians.items():
            if hessian.any().item():
                damped = shrunk(hessian * tokens.size, tokens.size, hessian, DEFAULT_PRIOR)
                done[name] = self._quantize_table(tables[name], damped[None], self._quantizer)
        self.files.save(EMBEDDING, done)
        drop_gradients(self.model, self._work)
        self.progress(1, "embedding")

    def _quantize_table(self, weight: Weight, hessian: mx.array, quantizer: Quantizer) -> Tensors:
        """Quantize a matrix as tall as the vocabulary under its `hessian` (1, in, in)."""
        hessians = Hessians(hessian)
        slices: list[Tensors] = []
        step = max(1, memory_limits().block_values // weight.shape[-1])
        for start in range(0, weight.shape[0], step):
            rows = self.model.values(weight.name, start, min(start + step, weight.shape[0]))
            require_finite(weight.name, rows)
            packed = self._packed(weight, rows[None], hessians, quantizer)
            slices.append(tuple(tensor[0] for tensor in packed))
            self.progress(0, weight.name)
            free_memory()
        return _concatenated(slices)


def _concatenated(slices: Sequence[Tensors]) -> Tensors:
    return tuple(np.concatenate(column) for column in zip(*slices, strict=True))
