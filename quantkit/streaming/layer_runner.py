"""Run any mlx-lm model with the weights of one layer in memory at a time.

The model is mlx-lm's own, built but never loaded. Its layers, and the modules around them, are
wrapped: a wrapper fetches its module's weights from the source, evaluates the output, and releases
the weights. So `model(tokens)` streams through the checkpoint, with the model's own masks and
caches. An embedding reads only the rows of its tokens, a head reads its rows in blocks.

Activations are float32, so that measurements show the effect of the weights alone. Packed experts
stay packed on a GPU, for mlx's kernels; on the CPU experts are plain products.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from typing import Any

from quantkit.artifacts.inventory import Weight
from quantkit.backend import mx, on_cpu
from quantkit.backend.cpu_functions import speed_up_mlx
from quantkit.backend.memory_limits import memory_limits
from quantkit.checkpoint.generic import loadable_model
from quantkit.checkpoint.source import Source
from quantkit.errors import SourceError
from quantkit.formats.codec import decode, decode_mxfp4, to_mx
from quantkit.formats.dtypes import FLOATS
from quantkit.formats.tiers import MXFP4, parse_tier
from quantkit.streaming.experts import plain_switch_linear
from quantkit.streaming.weight_loader import (
    Call,
    Embedding,
    Head,
    StoredRows,
    StreamedModule,
    VocabularyTable,
)
from quantkit.units import version_numbers

_TOLERANCE = 1e-3  # of the largest logit


class _EnoughError(Exception):
    """The last layer has run, and the rest of the model is not needed."""


class StreamingModel:
    """mlx-lm's model of a source. Call it with tokens (batch, tokens) for logits."""

    def __init__(self, source: Source) -> None:
        """Raises SourceError for an architecture whose layers cannot be wrapped."""
        self.source = source
        self.weights = source.weights
        self._unquantized_shapes = {
            tensor.name: tensor.shape for tensor in source.inventory.unquantized
        }
        self._names = list(source.views)
        self.model = _build(source)
        self.model.eval()
        paths = {id(module): path for path, module in self.model.named_modules()}
        layers = _list_of_layers(self.model)
        self.layers = [StreamedModule(m, paths[id(m)], self.fetch) for m in layers]
        self._is_layerwise = False  # not yet known
        self.tables: dict[str, VocabularyTable] = {}
        self._wrap_around()
        layers[:] = self.layers

    def __call__(self, tokens: mx.array) -> mx.array:
        logits: mx.array = self.model(tokens)
        return logits

    def run(self, tokens: mx.array, seen: Callable[[int, Call, mx.array], None]) -> mx.array:
        """Return the output of the last layer (batch, tokens, hidden) for tokens (batch, tokens).

        `seen` receives the number, the call and the output of every layer. Raises SourceError
        unless the model is its layers, each called once in turn, and a head, or if a layer returns
        NaN. The first run shows it, by a token that goes on to the head.
        """
        last: list[mx.array] = []

        def through(number: int, layer: StreamedModule) -> Callable[[Call], mx.array]:
            def run(call: Call) -> mx.array:
                self._require_passed_on(number, last, call)
                y = layer.run(call)
                self._require_single(call, y)
                if not mx.isfinite(y).all().item():
                    raise SourceError(
                        f"layer {number} ({layer.path}): its output is not finite. Is the "
                        "checkpoint damaged? Check its hashes."
                    )
                last[:] = [y]
                seen(number, call, y)
                if number < len(self.layers) - 1:
                    return y
                if self._is_layerwise:
                    raise _EnoughError
                return y[:1, :1]

            return run

        with suppress(_EnoughError):
            with self._instead([through(*numbered) for numbered in enumerate(self.layers)]):
                logits = self.model(tokens)
            self._require_head(logits, last[0][:1, :1])
            self._is_layerwise = True
        return last[0]

    def require_layerwise(self, tokens: mx.array) -> None:
        """Raise SourceError unless the model can be run layer by layer, as `run` does.

        The first sequence of `tokens` (batch, tokens) shows it, unless the model has run before.
        """
        if not self._is_layerwise:
            self.run(tokens[:1], lambda *_: None)

    def _refusal(self, habit: str) -> SourceError:
        kind = self.source.inventory.model_type
        return SourceError(f"{kind}: {habit}; such models cannot be profiled.")

    def _require_head(self, logits: mx.array, h: mx.array) -> None:
        expected = self.head(h)
        if (mx.abs(logits - expected).max() > _TOLERANCE * mx.abs(expected).max()).item():
            raise self._refusal("computes more than its layers once and its head")

    def _require_single(self, call: Call, y: Any) -> None:
        if not isinstance(y, mx.array) or y.ndim != 3 or y.shape != call.x.shape:
            raise self._refusal("its layers pass more than one array")

    def _require_passed_on(self, number: int, last: list[mx.array], call: Call) -> None:
        if last and number == 0:
            raise self._refusal("computes more than its layers once and its head")
        if last and not mx.array_equal(last[0], call.x):
            between = f"between layers {number - 1} and {number}"
            raise self._refusal(f"changes the output {between}")

    def calls(self, tokens: mx.array) -> list[Call]:
        """Return the call of each layer for tokens (batch, tokens), without running any layer.

        All calls have the first layer's input.
        """
        calls: list[Call] = []

        def keep(call: Call) -> mx.array:
            calls.append(call)
            if len(calls) == len(self.layers):
                raise _EnoughError
            return call.x

        try:
            with self._instead([keep] * len(self.layers)):
                self.model(tokens)
        except _EnoughError:
            pass
        return calls

    def head(self, h: mx.array) -> mx.array:
        """Return logits (batch, tokens, vocabulary) for `h` (batch, tokens, hidden), the last
        layer's output.
        """
        some = mx.zeros(h.shape[:2], mx.int32)
        with self._instead([lambda call: call.x] * (len(self.layers) - 1) + [lambda _: h]):
            logits: mx.array = self.model(some)
        return logits

    def head_block(self, h: mx.array, rows: range, stored: StoredRows | None = None) -> mx.array:
        """Return logits (batch, tokens, len(rows)) for some rows of the vocabulary.

        `h` (batch, tokens, hidden) is the last layer's output; `stored` takes the place of the
        head's values.
        """
        with self.tables[self.head_weight.name].restricted(rows, stored):
            return self.head(h)

    def head_input(self, h: mx.array) -> mx.array:
        """Return the input (batch, tokens, hidden) of the head for `h`, the last layer's output."""
        self.head_block(h, range(1))
        return self.tables[self.head_weight.name].last_input

    def embedded(self, tokens: mx.array, stored: Mapping[str, StoredRows]) -> mx.array:
        """Return the first layer's input (batch, tokens, hidden); `stored` takes the place of the
        embeddings' values, by name.
        """
        with ExitStack() as stack:
            for name, values in stored.items():
                table = self.tables[name]
                stack.enter_context(table.restricted(table.rows, values))
            return self.calls(tokens)[0].x

    def behind_embedding(self, name: str, tokens: mx.array, g: mx.array) -> mx.array:
        """Return the gradient (batch, tokens, width) at the output of the embedding `name`.

        `g` (batch, tokens, hidden) is the gradient at the first layer's input: models scale the
        embedded tokens, or add to them.
        """
        table = self.tables[name]
        assert isinstance(table, Embedding), name

        def first(change: mx.array) -> mx.array:
            with table.shifted(change):
                return self.calls(tokens)[0].x

        nothing = mx.zeros((*tokens.shape, table.weight.shape[-1]))
        _, (gradient,) = mx.vjp(first, [nothing], [g])
        return gradient

    def head_blocks(self, tokens: int) -> Iterator[range]:
        """Yield blocks of rows of the vocabulary whose logits fit in memory for so many tokens."""
        rows, width = self.head_weight.shape
        step = max(1, memory_limits().logits // max(width, tokens))
        for start in range(0, rows, step):
            yield range(start, min(start + step, rows))

    @property
    def head_weight(self) -> Weight:
        """The output head, which is the embedding if that is tied."""
        weights = [table.weight for table in self.tables.values()]
        heads = [weight for weight in weights if weight.role == "lm_head"]
        # A table of positions may exist beside the vocabulary, and is smaller.
        return (heads or sorted(weights, key=lambda weight: -weight.shape[0]))[0]

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
        """Return the parameters of the module at `path`, by relative names, in the shape of the
        model.
        """
        prefix = f"{path}."
        values = {}
        for name in self._names:
            if name.startswith(prefix):
                value = self.parameter(name)
                if value is not None:
                    mx.eval(value)  # or the inputs of all weights stay in memory
                    values[name[len(prefix) :]] = value
        return values

    def values(self, name: str, start: int = 0, stop: int | None = None) -> mx.array:
        """Return the values (..., out, in) of a weight, or of some of its rows (rows, in).

        The dtype is the weight's float type. Affine tiers give float32, with scales and biases
        widened as in MLX's kernels.
        """
        weight = self.weights[name]
        tier = parse_tier(weight.storage)
        whole = stop is None
        rows = (start, self.source.views[f"{name}.weight"].rows if stop is None else stop)
        if tier == MXFP4:
            packed, scales = (self.source.read(f"{name}.{p}", *rows) for p in ("weight", "scales"))
            values = decode_mxfp4(packed, scales)
        elif tier.quantized:
            values = decode(tuple(self._packed_tensors(name, *rows)), tier, "F32")
        else:
            values = to_mx(self.source.read(f"{name}.weight", *rows), tier.name.upper())
        return values.reshape(weight.shape) if whole else values

    def _packed_tensors(self, name: str, start: int, stop: int) -> Iterator[mx.array]:
        """Yield rows of the tensors of a packed weight; float scales and biases in float32."""
        for suffix in ("weight", "scales", "biases"):
            if (view := self.source.views.get(f"{name}.{suffix}")) is not None:
                values = to_mx(view.read(self.source.checkpoint, start, stop), view.dtype)
                yield values.astype(mx.float32) if view.dtype in FLOATS else values

    def _rows(self, name: str, suffix: str, start: int, stop: int) -> mx.array:
        if suffix == "weight":
            return self.values(name, start, stop)
        view = self.source.views[f"{name}.{suffix}"]
        return to_mx(self.source.read(f"{name}.{suffix}", 0, view.rows), view.dtype)[
            ..., start:stop
        ]

    def parameter(self, name: str) -> mx.array | None:
        """Return a stored tensor, in the model's shape, as the model computes with it.

        None for the scales of a weight that is not computed packed.
        """
        owner, _, suffix = name.rpartition(".")
        weight = self.weights.get(owner)
        if suffix not in ("weight", "scales", "biases"):
            weight = None
        if weight is not None and not keeps_packed(weight):
            return self.values(owner).astype(mx.float32) if suffix == "weight" else None
        view = self.source.views[name]
        values = to_mx(self.source.read(name, 0, view.rows), view.dtype)
        if view.dtype in FLOATS:
            values = values.astype(mx.float32)
        if weight is not None:
            return values.reshape(*weight.shape[:-1], -1)
        return values.reshape(self._unquantized_shapes[name])

    def _wrap_around(self) -> None:
        """Wrap the leaf modules outside the layers (embedding, norm, head)."""
        inside = tuple(f"{layer.path}." for layer in self.layers)
        owned = {name.rpartition(".")[0] for name in self._names}
        for path, module in list(self.model.named_modules()):
            if path in owned and not f"{path}.".startswith(inside):
                parent, _, name = path.rpartition(".")
                owner = submodule(self.model, parent)
                if isinstance(owner, list):
                    owner[int(name)] = self._wrapped(path, module)
                else:
                    setattr(owner, name, self._wrapped(path, module))

    def _wrapped(self, path: str, module: Any) -> StreamedModule:
        weight = self.weights.get(path)
        if weight is not None and weight.role in ("embedding", "lm_head"):
            table = Head if weight.role == "lm_head" else Embedding
            self.tables[path] = table(module, weight, partial(self._rows, path))
            return self.tables[path]
        return StreamedModule(module, path, self.fetch)


def has_gradients(source: Source) -> bool:
    """Return whether the installed mlx-lm can differentiate the model.

    Mixtures of experts need mlx-lm 0.32.
    """
    return not source.inventory.experts or version_numbers(version("mlx-lm")) >= (0, 32)


def submodule(module: Any, path: str) -> Any:
    """Return the module at `path` inside `module`, or `module` itself for an empty path."""
    for name in path.split(".") if path else ():
        if isinstance(module, list):
            module = module[int(name)]
        else:
            module = module[name] if name in module else getattr(module, name)
    return module


def _list_of_layers(model: Any) -> list[Any]:
    """Return the list, in whichever module, that holds the layers. Raises SourceError."""
    first = model.layers[0]  # `layers` itself may be a copy, cut for pipelines
    for _, module in model.named_modules():
        for value in module.values():
            if isinstance(value, list) and any(entry is first for entry in value):
                return value
    raise SourceError(
        f"{model.model_type}: quantkit cannot run this architecture a layer at a time, "
        "since its layers are not in a list."
    )


def keeps_packed(weight: Weight) -> bool:
    """Return whether the model computes with the packed values of `weight`."""
    return parse_tier(weight.storage).quantized and not on_cpu()


def _build(source: Source) -> Any:
    """Build mlx-lm's model with the kinds of modules that `StreamingModel.fetch` fills,
    unevaluated.
    """
    from mlx.nn import quantize
    from mlx.utils import tree_unflatten
    from mlx_lm.models.switch_layers import SwitchLinear

    model = loadable_model(source.checkpoint)
    packed = {
        weight.name: parse_tier(weight.storage).config_entry()
        for weight in source.inventory.weights
        if keeps_packed(weight)
    }
    if packed:
        quantize(model, class_predicate=lambda path, _: packed.get(path, False))
    if on_cpu():
        speed_up_mlx()
        plain = [
            (path, plain_switch_linear(module))
            for path, module in model.named_modules()
            if isinstance(module, SwitchLinear)
        ]
        model.update_modules(tree_unflatten(plain))
    return model
