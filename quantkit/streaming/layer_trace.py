"""One layer, remembered module by module, so that a changed weight re-runs only what it touches.

In a layer the modules that hold weights (projections, router, experts) are called one after the
other. When one of them changes, those called before it give what they gave; so do its siblings,
called with the very same input (keys and values beside a query). Only what comes after is run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quantkit.backend import mx
from quantkit.formats.affine import Rounded
from quantkit.formats.codec import encode, rounded
from quantkit.formats.tiers import Tier
from quantkit.streaming.layer_runner import submodule
from quantkit.streaming.weight_loader import Call, StreamedModule

Listener = Callable[[str, mx.array, "mx.array | None"], None]
"""Told the name of a weight, its input, and which experts see it (None for a plain matrix)."""

Product = Callable[..., mx.array]
"""Stands in for a weight's module: called with that, and what it was to be called with."""


@dataclass(frozen=True)
class Step:
    """One call of a module: whose, with what, and its output."""

    name: str
    args: tuple[Any, ...]
    y: mx.array

    def is_sibling(self, other: "Step") -> bool:
        """Whether both were called with the very same arrays."""
        same = all(a is b for a, b in zip(self.args, other.args, strict=False))
        return same and len(self.args) == len(other.args)


@dataclass(frozen=True)
class Trace:
    """One run of a layer: what it was called with, the calls inside of it, and its output."""

    call: Call
    steps: tuple[Step, ...]
    y: mx.array

    def touched_by(self, name: str) -> set[int]:
        """The steps whose output a change to the weight `name` may change."""
        own = [number for number, step in enumerate(self.steps) if step.name == name]
        first = self.steps[own[0]]
        return {
            number
            for number, step in enumerate(self.steps)
            if number >= own[0] and (number in own or not step.is_sibling(first))
        }

    def output(self, name: str | None) -> mx.array:
        """The output of the weight called `name`, of the whole layer for None."""
        return self.y if name is None else next(s.y for s in self.steps if s.name == name)


class _ReachedError(Exception):
    """The output that was wanted is there; the rest of the layer need not run."""

    def __init__(self, y: mx.array) -> None:
        self.y = y


class _Tap:
    """Stands in a layer for a module that holds a weight, and lets `hear` decide what it gives."""

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        self.hear: Callable[[_Tap, tuple[Any, ...], dict[str, Any]], mx.array] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.hear is None:
            return self.module(*args, **kwargs)
        return self.hear(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class HookedLayer:
    """A layer with its weights in memory, and an ear at every one of them."""

    def __init__(self, module: Any, taps: Mapping[str, _Tap]) -> None:
        self.module = module
        self._taps = taps

    def run(self, call: Call) -> mx.array:
        """The layer's output."""
        y = self._run(call)
        mx.eval(y)
        return y

    def record(self, call: Call, listen: Listener | None = None) -> Trace:
        """Run the layer and remember."""
        steps: list[Step] = []

        def hear(tap: _Tap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
            y: mx.array = tap.module(*args, **kwargs)
            steps.append(Step(tap.name, args, y))
            return y

        with self._hearing(hear):
            y = self._run(call)
        mx.eval(y, [step.y for step in steps])
        if listen:
            for step in steps:
                listen(step.name, step.args[0], step.args[1] if len(step.args) > 1 else None)
        return Trace(call, tuple(steps), y)

    def gradients(
        self, trace: Trace, g: mx.array, names: Sequence[str]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """(gradient at the layer's input, at the outputs of `names`), for `g` at its output."""

        def run(x: mx.array, *offsets: mx.array) -> mx.array:
            added = dict(zip(names, offsets, strict=True))

            def hear(tap: _Tap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
                y: mx.array = tap.module(*args, **kwargs)
                return y + added[tap.name] if tap.name in added else y

            with self._hearing(hear):
                return self._run(Call(x, trace.call.args, trace.call.kwargs))

        zeros = [mx.zeros_like(trace.output(name)) for name in names]
        _, (at_input, *at_names) = mx.vjp(run, [trace.call.x, *zeros], [g])
        mx.eval(at_input, at_names)
        return at_input, dict(zip(names, at_names, strict=True))

    def rerun(self, trace: Trace, name: str, until: str | None) -> mx.array:
        """The output of `until` (None: of the layer) now that the weight `name` has changed."""
        touched = trace.touched_by(name)
        steps = iter(enumerate(trace.steps))

        def hear(tap: _Tap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
            number, step = next(steps)
            y: mx.array = tap.module(*args, **kwargs) if number in touched else step.y
            if tap.name == until:
                raise _ReachedError(y)
            return y

        try:
            with self._hearing(hear):
                return self._run(trace.call)
        except _ReachedError as reached:
            return reached.y

    def run_with(self, call: Call, products: Mapping[str, Product]) -> mx.array:
        """The layer's output, not evaluated, some weights' modules replaced by functions."""

        def hear(tap: _Tap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
            product = products.get(tap.name)
            if product is None:
                y: mx.array = tap.module(*args, **kwargs)
                return y
            return product(tap.module, *args, **kwargs)

        with self._hearing(hear):
            return self._run(call)

    @contextmanager
    def changed(
        self, name: str, values: mx.array, tier: Tier, made: Rounded | None = None
    ) -> Iterator[None]:
        """The weight `name` rounded to `tier`, from its `values` (..., out, in): to nearest, or as
        `made` already is."""
        module = self._taps[name].module
        before = dict(module)
        settings = {k: getattr(module, k, None) for k in ("group_size", "bits", "mode")}
        try:
            if "scales" in module:
                _pack(module, encode(values, tier) if made is None else made.packed(tier), tier)
            else:
                module.weight = rounded(values, tier) if made is None else made.values(tier)
            yield
        finally:
            for key in [key for key in module if key not in before]:
                module.pop(key)
            module.update(before)
            for key, value in settings.items():
                if value is not None:
                    setattr(module, key, value)

    def _run(self, call: Call) -> mx.array:
        y: mx.array = self.module(call.x, *call.args, **call.kwargs)
        return y

    @contextmanager
    def _hearing(
        self, hear: Callable[[_Tap, tuple[Any, ...], dict[str, Any]], mx.array]
    ) -> Iterator[None]:
        for tap in self._taps.values():
            tap.hear = hear
        try:
            yield
        finally:
            for tap in self._taps.values():
                tap.hear = None


def _pack(module: Any, tensors: tuple[mx.array, ...], tier: Tier) -> None:
    """Let a quantized module compute with the `tensors` of `tier`."""
    packed, scales, *biases = tensors
    module.weight = packed
    module.scales = scales if scales.dtype == mx.uint8 else scales.astype(mx.float32)
    module.pop("biases", None)
    if biases:
        module.biases = biases[0].astype(mx.float32)
    module.group_size, module.bits, module.mode = tier.group_size, tier.bits, tier.mode


@contextmanager
def hooked(layer: StreamedModule, names: Sequence[str]) -> Iterator[HookedLayer]:
    """`layer` with its weights in memory; `names` are those of the weights to tap."""
    with layer.loaded() as module:
        taps = {}
        for name in names:
            parent, _, last = name.removeprefix(f"{layer.path}.").rpartition(".")
            owner = submodule(module, parent)
            taps[name] = _Tap(name, owner[last])
            setattr(owner, last, taps[name])
        try:
            yield HookedLayer(module, taps)
        finally:
            for name, tap in taps.items():
                parent, _, last = name.removeprefix(f"{layer.path}.").rpartition(".")
                setattr(submodule(module, parent), last, tap.module)
