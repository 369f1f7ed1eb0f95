"""Any mlx-lm model, run with the weights of one layer in memory at a time.

The model is mlx-lm's own, built but never loaded. Its layers, and the modules around them, are
wrapped: a wrapper fetches its module's weights from the source when it is called, evaluates the
output, and lets the weights go. So `model(tokens)` streams through the checkpoint, whatever the
model's masks and caches are.

On a GPU packed weights stay packed and mlx's kernels use them; on the CPU everything is float32 and
experts are plain products.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quantkit.artifacts.inventory import Weight
from quantkit.backend import mx, on_cpu
from quantkit.errors import SourceError
from quantkit.formats.codec import decode_mxfp4, to_mx
from quantkit.formats.dtypes import FLOATS
from quantkit.formats.tiers import MXFP4, parse_tier
from quantkit.model.experts import plain_switch_linear
from quantkit.source.generic import build_model
from quantkit.source.source import Source


@dataclass(frozen=True)
class Call:
    """What a layer was called with: its input (batch, tokens, hidden), and masks and caches."""

    x: mx.array
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Streamed:
    """A module whose weights are there only while it is called.

    Whatever else is asked of it is answered by the module.
    """

    def __init__(self, module: Any, path: str, fetch: Callable[[str], dict[str, mx.array]]) -> None:
        self.module = module
        self.path = path
        self._fetch = fetch
        self._depth = 0
        self.instead: Callable[[Call], mx.array] | None = None

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        call = Call(x, args, kwargs)
        return self.instead(call) if self.instead else self.run(call)

    def run(self, call: Call) -> mx.array:
        """The module's output, evaluated, its weights fetched and let go again."""
        with self.loaded():
            y: mx.array = self.module(call.x, *call.args, **call.kwargs)
            mx.eval(y)
        return y

    def as_linear(self, x: mx.array) -> mx.array:
        """The head of a model whose embedding is tied."""
        with self.loaded():
            y: mx.array = self.module.as_linear(x)
            mx.eval(y)
        return y

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    @contextmanager
    def loaded(self) -> Iterator[Any]:
        """The module with its weights in memory; nests."""
        if self._depth == 0:
            self._empty = self.module.parameters()
            self.module.load_weights(list(self._fetch(self.path).items()))
        self._depth += 1
        try:
            yield self.module
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.module.update(self._empty)
                mx.clear_cache()


class StreamingModel:
    """mlx-lm's model of a source. Call it with tokens (batch, tokens) for logits."""

    def __init__(self, source: Source) -> None:
        """Raises SourceError for an architecture whose layers cannot be wrapped."""
        self.source = source
        self._weights = {weight.name: weight for weight in source.inventory.weights}
        self._kept_shapes = {tensor.name: tensor.shape for tensor in source.inventory.kept}
        self._names = list(source.views)
        self.model = _build(source)
        self.model.eval()
        paths = {id(module): path for path, module in self.model.named_modules()}
        held = _list_of_layers(self.model)
        self.layers = [Streamed(m, paths[id(m)], self.fetch) for m in held]
        self._wrap_around()
        held[:] = self.layers

    def __call__(self, tokens: mx.array) -> mx.array:
        logits: mx.array = self.model(tokens)
        return logits

    def inputs(self, tokens: mx.array) -> tuple[list[Call], mx.array]:
        """(what each layer is called with, logits) in one pass, all layers' inputs kept."""
        calls: list[Call] = []

        def keep(layer: Streamed) -> Callable[[Call], mx.array]:
            def run(call: Call) -> mx.array:
                calls.append(call)
                return layer.run(call)

            return run

        with self._instead([keep(layer) for layer in self.layers]):
            logits = self.model(tokens)
        return calls, logits

    def head(self, tokens: mx.array, h: mx.array) -> mx.array:
        """Logits for `h`, the output of the last layer: all that the model does after it."""
        with self._instead([lambda call: call.x] * (len(self.layers) - 1) + [lambda _: h]):
            logits: mx.array = self.model(tokens)
        return logits

    @contextmanager
    def _instead(self, replacements: list[Callable[[Call], mx.array]]) -> Iterator[None]:
        for layer, replacement in zip(self.layers, replacements, strict=True):
            layer.instead = replacement
        try:
            yield
        finally:
            for layer in self.layers:
                layer.instead = None

    def fetch(self, path: str) -> dict[str, mx.array]:
        """The parameters of the module at `path`, named relative to it, to compute with."""
        prefix = f"{path}."
        found = {}
        for name in self._names:
            if name.startswith(prefix):
                value = self._parameter(name)
                if value is not None:
                    found[name[len(prefix) :]] = value
        return found

    def weight(self, name: str) -> mx.array:
        """The values of a weight, (..., out, in): float32 on the CPU, else its float type."""
        weight = self._weights[name]
        view = self.source.views[f"{name}.weight"]
        carrier = self.source.read(f"{name}.weight", 0, view.rows)
        if parse_tier(weight.storage) == MXFP4:
            values = decode_mxfp4(carrier, self.source.read(f"{name}.scales", 0, view.rows))
        else:
            values = to_mx(carrier, view.dtype)
        return _compute_type(values).reshape(weight.shape)

    def _parameter(self, name: str) -> mx.array | None:
        owner, _, part = name.rpartition(".")
        weight = self._weights.get(owner)
        if weight is not None and part == "weight" and not keeps_packed(weight):
            return self.weight(owner)
        if weight is not None and part == "scales" and not keeps_packed(weight):
            return None
        view = self.source.views[name]
        values = to_mx(self.source.read(name, 0, view.rows), view.dtype)
        if weight is not None and part in ("weight", "scales"):
            return values.reshape(*weight.shape[:-1], -1)
        if view.dtype in FLOATS:
            values = _compute_type(values)
        return values.reshape(self._kept_shapes[name])

    def _wrap_around(self) -> None:
        """Wrap the leaf modules outside of the layers (embedding, norm, head)."""
        inside = tuple(f"{layer.path}." for layer in self.layers)
        owned = {name.rpartition(".")[0] for name in self._names}
        for path, module in list(self.model.named_modules()):
            if path in owned and not f"{path}.".startswith(inside):
                parent, _, name = path.rpartition(".")
                owner = self.model
                for part in parent.split(".") if parent else ():
                    owner = owner[part] if isinstance(owner, dict) else getattr(owner, part)
                setattr(owner, name, Streamed(module, path, self.fetch))


def _list_of_layers(model: Any) -> list[Any]:
    """The list, in whichever module, that holds the layers. Raises SourceError for none."""
    first = model.layers[0]  # `layers` itself may be a copy, cut for pipelines
    for _, module in model.named_modules():
        for value in module.values():
            if isinstance(value, list) and any(entry is first for entry in value):
                return value
    raise SourceError(
        f"{model.model_type}: quantkit cannot run this architecture a layer at a time: "
        "its layers are in no list."
    )


def keeps_packed(weight: Weight) -> bool:
    """Whether the model computes with the packed values of `weight`."""
    return parse_tier(weight.storage).quantized and not on_cpu()


def _compute_type(values: mx.array) -> mx.array:
    return values.astype(mx.float32) if on_cpu() else values


def _build(source: Source) -> Any:
    """mlx-lm's model with modules of the kinds that `StreamingModel.fetch` fills; nothing is
    evaluated."""
    from mlx.nn import quantize
    from mlx.utils import tree_unflatten
    from mlx_lm.models.switch_layers import SwitchLinear

    model = build_model(source.checkpoint)
    packed = {
        weight.name: parse_tier(weight.storage).config_entry()
        for weight in source.inventory.weights
        if keeps_packed(weight)
    }
    if packed:
        quantize(model, class_predicate=lambda path, _: packed.get(path, False))
    if on_cpu():
        plain = [
            (path, plain_switch_linear(module))
            for path, module in model.named_modules()
            if isinstance(module, SwitchLinear)
        ]
        model.update_modules(tree_unflatten(plain))
    return model
