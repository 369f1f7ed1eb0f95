"""One layer, recorded module by module, so that a changed weight re-runs only the modules behind
it.

The modules of a layer that hold weights (projections, router, experts) are called in order. If one
of them changes, the modules before it return their recorded outputs; so do its siblings, which have
the very same input (keys and values beside a query). Only the modules behind it run again.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from quantkit.backend import mx
from quantkit.formats.affine import AffineWeight
from quantkit.formats.codec import encode, fake_quantize
from quantkit.formats.tiers import Tier
from quantkit.streaming.layer_runner import submodule
from quantkit.streaming.products import Product, decoded_matrices
from quantkit.streaming.weight_loader import Call, StreamedModule

Observer = Callable[[str, mx.array, "mx.array | None"], None]
"""Called with a weight's name, its input, and the experts of the input (None for a matrix)."""


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: the weight's name, the arguments, and the output `y`."""

    name: str
    args: tuple[Any, ...]
    y: mx.array
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def is_sibling(self, other: "ModuleCall") -> bool:
        """Return whether both calls have the very same arrays as arguments."""
        same = all(a is b for a, b in zip(self.args, other.args, strict=False))
        return same and len(self.args) == len(other.args)


@dataclass(frozen=True)
class LayerTrace:
    """One run of a layer: its call, the calls of its modules, and its output `y`.

    `routes` are the experts (batch, tokens, active) of all tokens, and `routed` the inputs (batch,
    tokens, hidden) of the experts, both by the path of the module that holds the stacks.
    """

    call: Call
    steps: tuple[ModuleCall, ...]
    y: mx.array
    routes: Mapping[str, mx.array]
    routed: Mapping[str, mx.array]

    def token_of_rows(self, step: ModuleCall) -> mx.array | None:
        """Return the token (rows,) of every row of the output of a stack, counted over the batch.

        mlx-lm may sort the rows by expert. None if they cannot be told, or for a plain weight.
        """
        routes = self.routes.get(step.name.rpartition(".")[0])
        if routes is None or len(step.args) < 2 or step.args[1].size != routes.size:
            return None
        flat = routes.reshape(-1)
        order = mx.arange(flat.size) if step.args[1].shape == routes.shape else mx.argsort(flat)
        if not mx.array_equal(flat[order], step.args[1].reshape(-1)).item():
            return None
        return order // routes.shape[-1]

    def touched_by(self, name: str) -> set[int]:
        """Return the numbers of the calls whose output a change of the weight `name` may change."""
        numbers = [number for number, step in enumerate(self.steps) if step.name == name]
        first = self.steps[numbers[0]]
        return {
            number
            for number, step in enumerate(self.steps)
            if number >= numbers[0] and (number in numbers or not step.is_sibling(first))
        }

    def calls_of(self, name: str) -> list[ModuleCall]:
        """Return the calls of the weight `name`."""
        return [step for step in self.steps if step.name == name]

    def values(self, readout: "Readout | None") -> mx.array:
        """Return the values (..., width) at a readout, or the output of the whole layer."""
        if readout is None:
            return self.y
        step = self.calls_of(readout.name)[0]
        values: mx.array = step.args[0] if readout.at_input else step.y
        return values


@dataclass(frozen=True)
class Readout:
    """A place in a layer: the output of the weight `name`, or its input."""

    name: str
    at_input: bool = False


class _ReachedError(Exception):
    """The readout is reached, and the rest of the layer is not needed."""

    def __init__(self, y: mx.array) -> None:
        self.y = y


Handle = Callable[["_Hook", tuple[Any, ...], dict[str, Any]], Any]


class _Hook:
    """Replaces a module that holds a weight, and lets `handle` compute its output."""

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        self.handle: Handle | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.handle is None:
            return self.module(*args, **kwargs)
        return self.handle(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class HookedLayer:
    """A layer with its weights in memory, a hook on every one of them, and one on every module that
    holds stacks."""

    def __init__(self, module: Any, hooks: Mapping[str, _Hook], holders: Sequence[_Hook]) -> None:
        self.module = module
        self._hooks = hooks
        self._holders = holders

    def run(self, call: Call) -> mx.array:
        """Return the layer's output (batch, tokens, hidden), evaluated."""
        y = self._run(call)
        mx.eval(y)
        return y

    def record(self, call: Call, observer: Observer | None = None) -> LayerTrace:
        """Run the layer and record the calls of its modules."""
        steps: list[ModuleCall] = []
        routes: dict[str, mx.array] = {}
        routed: dict[str, mx.array] = {}

        def handle(hook: _Hook, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
            y: mx.array = hook.module(*args, **kwargs)
            steps.append(ModuleCall(hook.name, args, y, kwargs))
            return y

        def route(hook: _Hook, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if len(args) > 1:
                routed[hook.name], routes[hook.name] = args[:2]
            return hook.module(*args, **kwargs)

        with self._handled(handle, route):
            y = self._run(call)
        mx.eval(y, [step.y for step in steps], routes, routed)
        if observer:
            for step in steps:
                observer(step.name, step.args[0], step.args[1] if len(step.args) > 1 else None)
        return LayerTrace(call, tuple(steps), y, routes, routed)

    def gradients(
        self, trace: LayerTrace, g: mx.array, readouts: Sequence[Readout]
    ) -> tuple[mx.array, dict[Readout, mx.array]]:
        """Return the gradients at the layer's input and at `readouts`.

        `g` (batch, tokens, hidden) is the gradient at the layer's output; results have the shapes
        of the values there.
        """

        def run(x: mx.array, *offsets: mx.array) -> mx.array:
            added = dict(zip(readouts, offsets, strict=True))

            def handle(hook: _Hook, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
                if (before := Readout(hook.name, at_input=True)) in added:
                    args = (args[0] + added[before], *args[1:])
                y: mx.array = hook.module(*args, **kwargs)
                return y + added[after] if (after := Readout(hook.name)) in added else y

            with self._handled(handle):
                return self._run(Call(x, trace.call.args, trace.call.kwargs))

        zeros = [mx.zeros_like(trace.values(readout)) for readout in readouts]
        at_input, *at_readouts = self.vjp(run, [trace.call.x, *zeros], g)
        return at_input, dict(zip(readouts, at_readouts, strict=True))

    def vjp(
        self, run: Callable[..., mx.array], inputs: Sequence[mx.array], g: mx.array
    ) -> list[mx.array]:
        """Return the gradients at the `inputs` of `run`, which runs the layer, evaluated.

        `g` (batch, tokens, hidden) is the gradient at its output; results have the shapes of the
        inputs.
        """
        modules = [self.module, *(hook.module for hook in (*self._hooks.values(), *self._holders))]
        for module in modules:
            module.train()  # mlx-lm then avoids Metal kernels, which have no gradients
        try:
            _, gradients = mx.vjp(run, list(inputs), [g])
            mx.eval(gradients)
        finally:
            for module in modules:
                module.eval()
        return gradients

    def rerun(self, trace: LayerTrace, name: str, readout: Readout | None) -> mx.array:
        """Return the values (..., width) at `readout` (None: the layer's output) after a change of
        `name`.
        """
        if readout == Readout(name):
            (call,) = trace.calls_of(name)
            changed: mx.array = self._hooks[name].module(*call.args, **call.kwargs)
            return changed
        touched = trace.touched_by(name)
        first = min(touched)
        steps = iter(enumerate(trace.steps))

        def handle(hook: _Hook, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
            number, step = next(steps)
            if number == first:  # its recorded inputs, which need no attention to run again
                args = step.args
            if readout == Readout(hook.name, at_input=True):
                raise _ReachedError(args[0])
            return hook.module(*args, **kwargs) if number in touched else step.y

        try:
            with self._handled(handle):
                return self._run(trace.call)
        except _ReachedError as reached:
            return reached.y

    def replay(
        self, trace: LayerTrace, products: Mapping[str, Product], names: Collection[str]
    ) -> list[tuple[ModuleCall, ModuleCall]]:
        """Return the calls of `names` in `trace`, each with its call after other products.

        Some modules are replaced by `products`. All others return their recorded outputs, and so do
        `names`: what is behind them does not change.
        """
        pairs: list[tuple[ModuleCall, ModuleCall]] = []
        wanted = sum(step.name in names for step in trace.steps)
        steps = iter(trace.steps)

        def handle(hook: _Hook, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
            step = next(steps)
            if hook.name in names:
                pairs.append((step, replace(step, args=args)))
                if len(pairs) == wanted:
                    raise _ReachedError(step.y)
                return step.y
            product = products.get(hook.name)
            return product(hook.module, *args, **kwargs) if product else step.y

        with suppress(_ReachedError), self._handled(handle):
            self._run(trace.call)
        mx.eval([call.args for _, call in pairs])
        return pairs

    def run_with(self, call: Call, products: Mapping[str, Product]) -> mx.array:
        """Return the layer's output (batch, tokens, hidden), lazily, with some modules replaced."""

        def handle(hook: _Hook, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
            product = products.get(hook.name)
            if product is None:
                y: mx.array = hook.module(*args, **kwargs)
                return y
            return product(hook.module, *args, **kwargs)

        with self._handled(handle):
            return self._run(call)

    @contextmanager
    def changed(
        self, name: str, values: mx.array, tier: Tier, quantized: AffineWeight | None = None
    ) -> Iterator[None]:
        """Change the weight `name` to `tier` for a while.

        Its `values` (..., out, in) are rounded to nearest, unless it is `quantized` already.
        """
        module = self._hooks[name].module
        before = dict(module)
        settings = {k: getattr(module, k, None) for k in ("group_size", "bits", "mode")}
        try:
            stack = hasattr(module, "instead") and tier.quantized
            if stack or "scales" in module:
                tensors = encode(values, tier) if quantized is None else quantized.packed(tier)
                mx.eval(tensors)
                if stack:
                    module.instead = decoded_matrices(tensors, tier)
                else:
                    _pack(module, tensors, tier)
            elif quantized is None:
                module.weight = fake_quantize(values, tier)
            else:
                module.weight = quantized.dequantized(tier)
            mx.eval(module.parameters())
            del values, quantized  # they would stay in memory while the layer runs
            yield
        finally:
            if hasattr(module, "instead"):
                module.instead = None
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
    def _handled(self, handle: Handle, route: Handle | None = None) -> Iterator[None]:
        for hook in self._hooks.values():
            hook.handle = handle
        for hook in self._holders:
            hook.handle = route
        try:
            yield
        finally:
            for hook in (*self._hooks.values(), *self._holders):
                hook.handle = None


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
def hooked(
    layer: StreamedModule, names: Sequence[str], stacks: Sequence[str] = ()
) -> Iterator[HookedLayer]:
    """Keep the weights of `layer` in memory, with hooks on the weights `names`.

    Runs also record the routes to those weights among them that are `stacks` of experts.
    """
    with layer.loaded() as module, ExitStack() as restored:

        def hook(name: str) -> _Hook:
            parent, _, last = name.removeprefix(f"{layer.path}.").rpartition(".")
            owner = submodule(module, parent)
            new = _Hook(name, owner[last])
            setattr(owner, last, new)
            restored.callback(setattr, owner, last, new.module)
            return new

        hooks = {name: hook(name) for name in names}
        holders = sorted({name.rpartition(".")[0] for name in stacks} - {layer.path})
        yield HookedLayer(module, hooks, [hook(name) for name in holders])
