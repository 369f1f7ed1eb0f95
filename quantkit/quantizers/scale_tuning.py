"""The closing pass: scales and biases tuned by the KL divergence to the native model.

The integers stay. Forward and backward run a layer at a time, as the profiler's do; scales, biases
and optimizer state of the other layers wait on disk. Adam (Kingma and Ba 2015) works on relative
changes: a scale in units of itself, a bias in units of the larger of itself and its scale.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantkit.backend import free_memory, mx
from quantkit.formats.codec import rounded, to_mx, to_numpy
from quantkit.formats.tiers import Tier
from quantkit.progress import Progress
from quantkit.quantizers.rounding import stored_float
from quantkit.storage.work_dir import Tensors, WorkDirectory
from quantkit.streaming.experts import switch_product
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.layer_trace import Product, hooked
from quantkit.streaming.lm_head import divergence_gradient
from quantkit.streaming.weight_loader import Call

_B1, _B2, _EPS = 0.9, 0.999, 1e-8
_LOOK = 10  # steps between two looks at the validation text
_STATE = "tuning.json"
_MOVES = ("change", "mean", "square")  # of Adam: the relative change, and its slope's two moments

Parts = dict[str, mx.array]
"""What is known of a layer's weights, as `weight q` (its integers) and `weight s start`, `unit`,
`change`, `mean`, `square` for its scales, the same with `b` for its biases."""


@dataclass(frozen=True)
class Tuning:
    """How long and how fast: `steps` of `tokens` each, at a `rate` that falls as a cosine."""

    steps: int
    tokens: int = 1024
    rate: float = 5e-4

    @property
    def all_tokens(self) -> int:
        """Tokens of all steps: so many can be new."""
        return self.steps * self.tokens


class _Experts:
    """A stack of experts whose matrices are made of integers, scales and biases as they are asked
    for, so that no gradient is as large as the stack."""

    def __init__(self, q: mx.array, scales: mx.array, biases: mx.array, tier: Tier) -> None:
        self.shape = q.shape
        self._parts = (q, scales, biases)
        self._tier = tier

    def __getitem__(self, which: slice) -> mx.array:
        q, scales, biases = (part[which] for part in self._parts)
        return _values(q, scales, biases, self._tier)


def _values(q: mx.array, scales: mx.array, biases: mx.array, tier: Tier) -> mx.array:
    groups = q.astype(mx.float32).reshape(*q.shape[:-1], -1, tier.group_size)
    return (groups * scales[..., None] + biases[..., None]).reshape(q.shape)


def _product(q: mx.array, tier: Tier, scales: mx.array, biases: mx.array) -> Product:
    """A module's product with the weight that the parts stand for."""

    def experts(module: Any, *args: Any, **kwargs: Any) -> mx.array:
        return switch_product(module, _Experts(q, scales, biases, tier), *args, **kwargs)

    return experts if q.ndim > 2 else _plain_product(_values(q, scales, biases, tier))


def _plain_product(weight: mx.array) -> Product:
    def plain(module: Any, x: mx.array) -> mx.array:
        y = x @ weight.T
        return y + module.bias if "bias" in module else y

    return plain


class Tuner:
    """Tunes what was rounded: `rounded` gives a layer's tensors by weight, all of affine tiers.

    `tiers` are those of all that is rounded; what `rounded` does not give, an embedding and a head
    are rounded to nearest here.
    `tokens` (sequences, length) are tuned on, `validation` ones decide which point is kept. Every
    step leaves its state in the work folder, and an interrupted run goes on from the last one.
    """

    def __init__(
        self,
        model: StreamingModel,
        tiers: Mapping[str, Tier],
        rounded: Callable[[int], dict[str, Tensors]],
        tuning: Tuning,
        tokens: np.ndarray,
        validation: np.ndarray,
        work: WorkDirectory,
        progress: Progress,
    ) -> None:
        self._model = model
        self._tiers = tiers
        self._rounded = rounded
        self._tuning = tuning
        self._tokens = tokens
        self._validation = validation
        self._work = work
        self._progress = progress
        self._changed = [
            [name for name in tiers if name.startswith(f"{layer.path}.")] for layer in model.layers
        ]

    def run(self) -> None:
        """Tune; the best point is then what `tensors` gives."""
        state = self._state()
        while state["step"] < self._tuning.steps:
            if state["step"] % _LOOK == 0:
                self._look(state)
            self._step(state["step"])
            state["step"] += 1
            self._work.save_table(_STATE, state)
        self._look(state)

    def tensors(self, number: int) -> dict[str, Tensors]:
        """A layer's tensors, with the scales and biases of the best point."""
        kept = self._work.arrays(f"best-{number}.npz")
        return {
            name: (packed, kept[f"{name} s"], kept[f"{name} b"])
            for name, (packed, _, _) in self._rounded(number).items()
        }

    def _state(self) -> dict[str, Any]:
        if self._work.has(_STATE):
            return self._work.table(_STATE)
        return {"step": 0, "best": None, "seen": []}

    def _look(self, state: dict[str, Any]) -> None:
        """Measure on the validation text, and keep this point if it is the best so far."""
        step, seen = state["step"], state["seen"]
        if seen and seen[-1][0] == step:
            return
        tokens = mx.array(self._validation)
        other = self._forward(tokens, step)
        kl, _ = self._divergence("validation", tokens, other)
        loss = float(np.array(kl).mean(dtype=np.float64))
        if state["best"] is None or loss < state["best"]:
            state["best"] = loss
            for number in range(len(self._changed)):
                stored = self._as_stored(number, self._parts(number, step))
                self._work.save_arrays(f"best-{number}.npz", stored)
        seen.append([step, loss])
        self._work.save_table(_STATE, state)
        self._progress(0, f"step {step}: {loss:.4f} on the validation text")

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
        tier = self._tiers.get(self._model.head_weight.name)
        return divergence_gradient(self._model, self._native(key, tokens), other, tier)

    def _native(self, key: str | None, tokens: mx.array) -> mx.array:
        """The native model's last layer output, kept under `key` for the next time round."""
        if key is None:
            return self._model.run(tokens, lambda *_: None)
        name = f"native-{key}.npy"
        if not self._work.has(name):
            self._work.save_array(name, self._model.run(tokens, lambda *_: None))
        return self._work.array(name)

    def _forward(
        self, tokens: mx.array, step: int, inputs: list[mx.array] | None = None
    ) -> mx.array:
        """The last layer's output, all that is tuned in its place; `inputs` gets every layer's."""
        calls = self._model.calls(tokens)
        embeddings = {
            name: self._tiers[name]
            for name, table in self._model.tables.items()
            if table.weight.role == "embedding" and name in self._tiers
        }
        x = self._model.embedded(tokens, embeddings)
        for number, (layer, dry) in enumerate(zip(self._model.layers, calls, strict=True)):
            if inputs is not None:
                inputs.append(x)
            products = self._products(number, self._parts(number, step))
            with hooked(layer, self._changed[number]) as module:
                outs = []
                for part in replace(dry, x=x).parts():
                    outs.append(module.run_with(part, products))
                    mx.eval(outs[-1])
            x = mx.concatenate(outs)
        return x

    def _backward(self, number: int, step: int, call: Call, g: mx.array) -> mx.array:
        """Move a layer's scales and biases by one step; gives the gradient at its input."""
        parts = self._parts(number, step)
        keys = [f"{name} {part}" for name in self._rounded(number) for part in "sb"]
        with hooked(self._model.layers[number], self._changed[number]) as module:

            def run(x: mx.array, *changes: mx.array) -> mx.array:
                tried = parts | {f"{k} change": c for k, c in zip(keys, changes, strict=True)}
                return module.run_with(replace(call, x=x), self._products(number, tried))

            changes = [parts[f"{key} change"] for key in keys]
            _, (at_input, *slopes) = mx.vjp(run, [call.x, *changes], [g])
            mx.eval(at_input, slopes)
        self._move(parts, dict(zip(keys, slopes, strict=True)), step)
        moved = {k: np.array(v) for k, v in parts.items() if k.rpartition(" ")[2] in _MOVES}
        self._work.save_arrays(f"tune-{number}-{(step + 1) % 2}.npz", moved)
        free_memory()
        return at_input

    def _move(self, parts: Parts, slopes: Mapping[str, mx.array], step: int) -> None:
        """One step of Adam."""
        rate = self._tuning.rate * 0.5 * (1 + math.cos(math.pi * step / self._tuning.steps))
        for key, slope in slopes.items():
            mean = _B1 * parts[f"{key} mean"] + (1 - _B1) * slope
            square = _B2 * parts[f"{key} square"] + (1 - _B2) * mx.square(slope)
            fair, size = mean / (1 - _B1 ** (step + 1)), square / (1 - _B2 ** (step + 1))
            parts[f"{key} change"] -= rate * fair / (mx.sqrt(size) + _EPS)
            parts[f"{key} mean"], parts[f"{key} square"] = mean, square
        mx.eval(parts)

    def _products(self, number: int, parts: Parts) -> dict[str, Product]:
        found = {}
        for name in self._changed[number]:
            tier, weight = self._tiers[name], self._model.weights[name]
            if f"{name} q" in parts:
                dtype = stored_float(weight)
                s, b = (_stored(parts, f"{name} {part}", dtype) for part in "sb")
                found[name] = _product(parts[f"{name} q"], tier, s, b)
            elif len(weight.shape) == 2:  # rounded to nearest; stacks of another kind are left
                found[name] = _plain_product(rounded(self._model.values(name), tier))
        return found

    def _parts(self, number: int, step: int) -> Parts:
        """A layer's integers, and all that is tuned of it, after `step` steps."""
        parts: Parts = {}
        for name, (packed, scales, biases) in self._rounded(number).items():
            tier, weight = self._tiers[name], self._model.weights[name]
            rows = (*weight.shape[:-1], -1)
            s, b = (
                to_mx(x, weight.dtype).astype(mx.float32).reshape(rows) for x in (scales, biases)
            )
            ones = mx.ones_like(s)
            integers = (mx.array(packed).reshape(rows), ones, mx.zeros_like(ones))
            q = mx.dequantize(*integers, tier.group_size, tier.bits)
            parts[f"{name} q"] = q.astype(mx.uint8)
            for part, start, unit in (("s", s, s), ("b", b, mx.maximum(mx.abs(b), mx.abs(s)))):
                key = f"{name} {part}"
                parts |= {f"{key} start": start, f"{key} unit": unit}
                parts |= {f"{key} {what}": mx.zeros_like(start) for what in _MOVES}
        if step:
            saved = self._work.arrays(f"tune-{number}-{step % 2}.npz")
            parts |= {key: mx.array(values) for key, values in saved.items()}
        mx.eval(parts)
        return parts

    def _as_stored(self, number: int, parts: Parts) -> dict[str, np.ndarray]:
        """Scales and biases as they are stored."""
        found = {}
        for name in self._rounded(number):
            dtype = stored_float(self._model.weights[name])
            for part in "sb":
                values = _stored(parts, f"{name} {part}", dtype).astype(dtype)
                found[f"{name} {part}"] = to_numpy(values)
        return found


def _stored(parts: Parts, key: str, dtype: mx.Dtype) -> mx.array:
    """Scales or biases as they will be stored, in float32; the gradient goes straight through."""
    moved = parts[f"{key} start"] + parts[f"{key} unit"] * parts[f"{key} change"]
    return moved + mx.stop_gradient(moved.astype(dtype).astype(mx.float32) - moved)
