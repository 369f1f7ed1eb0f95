"""Scale tuning: scales and biases are optimized by the KL divergence to the native model.

The integers stay. Forward and backward pass run a layer at a time, as in the profiler; the state of
the other layers waits on disk. Adam (Kingma and Ba 2015) moves the scale of each group and its
centre, the value of its mean integer; biases follow. (A bias is the value of integer 0: around it a
change of scale moves the whole group one way, to which the loss is far more sensitive than to its
spread.) Both move in units that change the weights of the group by one step of its integers in the
root mean square, so that a rate means as much in any number of bits.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from quantkit.backend import free_memory, mx
from quantkit.formats.affine import AffineWeight, grouped
from quantkit.formats.codec import decode, fake_quantize, to_mx, to_numpy
from quantkit.formats.tiers import Tier
from quantkit.progress import Stage
from quantkit.quantizers.layer_files import EMBEDDING, LayerFiles
from quantkit.quantizers.matrix import scales_dtype
from quantkit.storage.work_dir import Tensors
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import hooked
from quantkit.streaming.lm_head import divergence_gradient
from quantkit.streaming.products import (
    ExpertMatrices,
    Product,
    experts_product,
    linear_product,
    plain_product,
)
from quantkit.streaming.recompute import recomputed
from quantkit.streaming.weight_loader import Call, StoredRows

_B1, _B2 = 0.9, 0.999
_EPS = 1e-15  # slopes shrink with the number of groups: 3e-6 with the demo's 1e7, the 120b has 2e9
_VALIDATE_EVERY = 10  # steps
_STATE = "tuning.json"
_MOMENTS = ("change", "mean", "square")  # of Adam: the change in units, two moments of its slope

LayerState = dict[str, mx.array]
"""The state of a layer: `weight q` (integers) and `weight middle` (their mean in each group), and
`weight s start`, `unit`, `change`, `mean`, `square` for its scales, start + unit x change, the same
with `c` for the centres of its groups, bias + scale x middle."""


@dataclass(frozen=True)
class Tuning:
    """The schedule: `steps` of `tokens` each, at a learning `rate` that falls as a cosine."""

    steps: int
    tokens: int = 1024
    rate: float = 1e-3

    @property
    def all_tokens(self) -> int:
        """The tokens of all steps, if no step repeats text."""
        return self.steps * self.tokens


@dataclass(frozen=True)
class TuningText:
    """Token ids (sequences, length): `tune` for the steps, `validate` to choose the best point."""

    tune: np.ndarray
    validate: np.ndarray


def _product(weight: AffineWeight, tier: Tier) -> Product:
    """Return the product of a module with the dequantized weight.

    Matrices are dequantized one by one, and once more in a backward pass: the dequantized experts
    of a layer of the 120b take 13 GB.
    """
    q, scales, biases = weight.q, weight.scales, weight.biases
    if q.ndim == 2:
        return linear_product(lambda x: _times(q, tier)(x, scales, biases))
    by_expert = list(zip(*(mx.split(x, len(q)) for x in (q, scales, biases)), strict=True))

    def times(rows: mx.array, expert: int) -> mx.array:
        integers, *others = (x.squeeze(0) for x in by_expert[expert])
        return _times(integers, tier)(rows, *others)

    return experts_product(ExpertMatrices(q.shape, times))


def _times(q: mx.array, tier: Tier) -> Callable[..., mx.array]:
    """Return the function of rows (..., in), scales and biases that multiplies the rows by the
    weight (out, in) of integers `q`."""
    return recomputed(lambda x, s, b: x @ AffineWeight(q, s, b).dequantized(tier).T)


class ScaleTuner:
    """Tunes the scales and biases of the quantized layers in `files`.

    The target is the native model, with the experts that a plan removes. `tiers` are the tiers of
    all changed weights; those without calibrated tensors take part as rounded to nearest. Every
    step leaves its state in the work directory, from which an interrupted run resumes.
    """

    def __init__(
        self,
        model: StreamingModel,
        tiers: Mapping[str, Tier],
        files: LayerFiles,
        tuning: Tuning,
        text: TuningText,
        progress: Stage,
    ) -> None:
        self._model = model
        whole = model.source.whole
        self._native_model = model if whole is None else StreamingModel(whole)
        self._tiers = tiers
        self._files = files
        self._tuning = tuning
        self._tokens = text.tune
        self._validation = text.validate
        self._work = files.work
        self._progress = progress
        self._changed = [
            [name for name in tiers if name.startswith(f"{layer.path}.")] for layer in model.layers
        ]

    @property
    def complete(self) -> bool:
        """Whether all steps are done, and the last point is measured."""
        seen = self._state()["seen"]
        return bool(seen) and bool(seen[-1][0] >= self._tuning.steps)

    def run(self) -> None:
        """Tune all layers. `tensors` then returns the best point."""
        state = self._state()
        self._progress(state["step"], "resumed")
        while state["step"] < self._tuning.steps:
            if state["step"] % _VALIDATE_EVERY == 0:
                self._validate(state)
            self._step(state["step"])
            state["step"] += 1
            self._work.save_table(_STATE, state)
            self._progress(1, f"step {state['step']} of {self._tuning.steps}")
        self._validate(state)

    def tensors(self, number: int) -> dict[str, Tensors]:
        """Return the tensors of a layer, with the scales and biases of the best point."""
        best = self._work.arrays(f"best-{number}.npz")
        return {
            name: (packed, best[f"{name} s"], best[f"{name} b"])
            for name, (packed, _, _) in self._files.load(number).items()
        }

    def _state(self) -> dict[str, Any]:
        if self._work.has(_STATE):
            return self._work.table(_STATE)
        return {"step": 0, "best": None, "seen": []}

    def _validate(self, state: dict[str, Any]) -> None:
        """Measure the KL divergence on the validation text, and save a new best point."""
        step, seen = state["step"], state["seen"]
        if seen and seen[-1][0] == step:
            return
        tokens = mx.array(self._validation)
        other = self._forward(tokens, step)
        kl, _ = self._divergence("validation", tokens, other)
        mean = float(np.array(kl).mean(dtype=np.float64))
        if state["best"] is None or mean < state["best"]:
            state["best"] = mean
            for number in range(len(self._changed)):
                stored = self._as_stored(number, self._layer_state(number, step))
                self._work.save_arrays(f"best-{number}.npz", stored)
        seen.append([step, mean])
        self._work.save_table(_STATE, state)
        self._progress(0, f"step {step}: KL {mean:.4f} on the validation text")

    def _step(self, step: int) -> None:
        count = max(1, self._tuning.tokens // self._tokens.shape[1])
        rows = [(step * count + i) % len(self._tokens) for i in range(count)]
        tokens = mx.array(self._tokens[rows])
        inputs: list[mx.array] = []
        other = self._forward(tokens, step, inputs)
        again = count * self._tuning.steps > len(self._tokens)
        kl, g = self._divergence(str(rows[0]) if again else None, tokens, other)
        g = g / kl.size
        for number, dry in reversed(list(enumerate(self._model.calls(tokens)))):
            g = self._backward(number, step, replace(dry, x=inputs[number]), g)
            self._progress(0, f"step {step + 1} of {self._tuning.steps}, layer {number}")

    def _divergence(
        self, key: str | None, tokens: mx.array, other: mx.array
    ) -> tuple[mx.array, mx.array]:
        head = self._tables.get(self._model.head_weight.name)
        return divergence_gradient(self._model, self._native(key, tokens), other, head)

    @cached_property
    def _tables(self) -> dict[str, StoredRows]:
        """The changed embeddings and heads, as they will be stored."""
        tensors = self._files.load(EMBEDDING) | self._files.load(len(self._model.layers))
        tables: dict[str, StoredRows] = {}
        for name, table in self._model.tables.items():
            if name in tensors:
                tables[name] = _rows_of(tensors[name], self._tiers[name], table.weight.dtype)
            elif name in self._tiers:
                tables[name] = self._tiers[name]
        return tables

    def _native(self, key: str | None, tokens: mx.array) -> mx.array:
        """Return the native model's last layer output, cached under `key`."""
        if key is None:
            return self._native_model.run(tokens, lambda *_: None)
        name = f"native-{key}.npy"
        if not self._work.has(name):
            self._work.save_array(name, self._native_model.run(tokens, lambda *_: None))
        return self._work.array(name)

    def _forward(
        self, tokens: mx.array, step: int, inputs: list[mx.array] | None = None
    ) -> mx.array:
        """Return the tuned model's last layer output; append the layers' inputs to `inputs`."""
        calls = self._model.calls(tokens)
        embeddings = {
            name: stored
            for name, stored in self._tables.items()
            if self._model.weights[name].role == "embedding"
        }
        x = self._model.embedded(tokens, embeddings)
        for number, (layer, dry) in enumerate(zip(self._model.layers, calls, strict=True)):
            if inputs is not None:
                inputs.append(x)
            products = self._products(number, self._layer_state(number, step))
            with hooked(layer, self._changed[number]) as module:
                outs = []
                for batch in replace(dry, x=x).batches():
                    outs.append(module.run_with(batch, products))
                    mx.eval(outs[-1])
            x = mx.concatenate(outs)
        return x

    def _backward(self, number: int, step: int, call: Call, g: mx.array) -> mx.array:
        """Move a layer's scales and biases by one step; return the gradient at its input."""
        state = self._layer_state(number, step)
        keys = [f"{name} {kind}" for name in self._files.load(number) for kind in "sc"]
        with hooked(self._model.layers[number], self._changed[number]) as module:

            def run(x: mx.array, *changes: mx.array) -> mx.array:
                tried = state | {f"{k} change": c for k, c in zip(keys, changes, strict=True)}
                return module.run_with(replace(call, x=x), self._products(number, tried))

            changes = [state[f"{key} change"] for key in keys]
            at_input, *slopes = module.vjp(run, [call.x, *changes], g)
        self._move(state, dict(zip(keys, slopes, strict=True)), step)
        moved = {k: np.array(v) for k, v in state.items() if k.rpartition(" ")[2] in _MOMENTS}
        self._work.save_arrays(f"tune-{number}-{(step + 1) % 2}.npz", moved)
        free_memory()
        return at_input

    def _move(self, state: LayerState, slopes: Mapping[str, mx.array], step: int) -> None:
        """Take one step of Adam."""
        rate = self._tuning.rate * 0.5 * (1 + math.cos(math.pi * step / self._tuning.steps))
        for key, slope in slopes.items():
            mean = _B1 * state[f"{key} mean"] + (1 - _B1) * slope
            square = _B2 * state[f"{key} square"] + (1 - _B2) * mx.square(slope)
            fair, size = mean / (1 - _B1 ** (step + 1)), square / (1 - _B2 ** (step + 1))
            state[f"{key} change"] -= rate * fair / (mx.sqrt(size) + _EPS)
            state[f"{key} mean"], state[f"{key} square"] = mean, square
        mx.eval(state)

    def _products(self, number: int, state: LayerState) -> dict[str, Product]:
        products = {}
        for name in self._changed[number]:
            tier, weight = self._tiers[name], self._model.weights[name]
            if f"{name} q" in state:
                stored = _stored(state, name, scales_dtype(weight))
                products[name] = _product(AffineWeight(state[f"{name} q"], *stored), tier)
            elif len(weight.shape) == 2:  # rounded to nearest; stacks of another kind stay native
                products[name] = plain_product(fake_quantize(self._model.values(name), tier))
        return products

    def _layer_state(self, number: int, step: int) -> LayerState:
        """Return the integers, scales, biases and optimizer state of a layer after `step` steps."""
        state: LayerState = {}
        spreads = self._spreads(number)
        for name, (packed, scales, biases) in self._files.load(number).items():
            tier, weight = self._tiers[name], self._model.weights[name]
            rows = (*weight.shape[:-1], -1)
            s, b = (
                to_mx(x, weight.dtype).astype(mx.float32).reshape(rows) for x in (scales, biases)
            )
            q = _integers(packed, weight.shape, tier)
            middle, spread = mx.array(spreads[name])
            state |= {f"{name} q": q.astype(mx.uint8), f"{name} middle": middle}
            for kind, start, unit in (("s", s, s / spread), ("c", b + s * middle, s)):
                key = f"{name} {kind}"
                state |= {f"{key} start": start, f"{key} unit": unit}
                state |= {f"{key} {moment}": mx.zeros_like(start) for moment in _MOMENTS}
            mx.eval(state)  # one weight's integers in float32 at a time
        if step:
            saved = self._work.arrays(f"tune-{number}-{step % 2}.npz")
            state |= {key: mx.array(values) for key, values in saved.items()}
        return state

    def _spreads(self, number: int) -> dict[str, np.ndarray]:
        """Return the mean and the standard deviation (2, ..., groups) of the integers of all groups
        of a layer, by weight. The work directory keeps them."""
        name = f"integers-{number}.npz"
        if not self._work.has(name):
            arrays = {}
            for weight, (packed, _, _) in self._files.load(number).items():
                tier, shape = self._tiers[weight], self._model.weights[weight].shape
                groups = grouped(_integers(packed, shape, tier), tier)
                spread = mx.maximum(groups.var(axis=-1), 1 / tier.group_size).sqrt()
                arrays[weight] = np.array(mx.stack([groups.mean(axis=-1), spread]))
            self._work.save_arrays(name, arrays)
        return self._work.arrays(name)

    def _as_stored(self, number: int, state: LayerState) -> dict[str, np.ndarray]:
        """Return scales and biases in their stored dtype."""
        arrays = {}
        for name in self._files.load(number):
            dtype = scales_dtype(self._model.weights[name])
            for kind, values in zip("sb", _stored(state, name, dtype), strict=True):
                arrays[f"{name} {kind}"] = to_numpy(values.astype(dtype))
        return arrays


def _rows_of(tensors: Tensors, tier: Tier, dtype: str) -> StoredRows:
    """Return a function that dequantizes rows of the `tensors` of a table."""
    packed, scales, biases = tensors

    def rows(start: int, stop: int) -> mx.array:
        s, b = (to_mx(x[start:stop], dtype).astype(mx.float32) for x in (scales, biases))
        return decode((mx.array(packed[start:stop]), s, b), tier, "F32")

    return rows


def _integers(packed: np.ndarray, shape: tuple[int, ...], tier: Tier) -> mx.array:
    """Return the integers of a packed weight of `shape` (..., in), in float32."""
    ones = mx.ones((*shape[:-1], shape[-1] // tier.group_size))
    words = mx.array(packed).reshape(*shape[:-1], -1)
    return decode((words, ones, mx.zeros_like(ones)), tier, "F32")


def _stored(state: LayerState, name: str, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Return scales and biases rounded to `dtype`, in float32."""
    scales = _rounded(_moved(state, f"{name} s"), dtype)
    biases = _moved(state, f"{name} c") - scales * state[f"{name} middle"]
    return scales, _rounded(biases, dtype)


def _moved(state: LayerState, key: str) -> mx.array:
    return state[f"{key} start"] + state[f"{key} unit"] * state[f"{key} change"]


def _rounded(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Round float32 values to `dtype`, with a straight-through gradient."""
    return x + mx.stop_gradient(x.astype(dtype).astype(mx.float32) - x)
