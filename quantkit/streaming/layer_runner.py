"""Any mlx-lm model, run with the weights of one layer in memory at a time.

The model is mlx-lm's own, built but never loaded. Its layers, and the modules around them, are
wrapped: a wrapper fetches its module's weights from the source when it is called, evaluates the
output, and lets the weights go. So `model(tokens)` streams through the checkpoint, whatever the
model's masks and caches are. Of an embedding only the rows that are looked up are read; a head
reads its rows in blocks.

All values are float32, so that what is measured is the weights' doing; only on a GPU are packed
experts left packed, for mlx's kernels. On the CPU experts are plain products.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from quantkit.artifacts.inventory import Weight
from quantkit.backend import mx, on_cpu
from quantkit.checkpoint.generic import build_model
from quantkit.checkpoint.source import Source
from quantkit.errors import SourceError
from quantkit.formats.codec import decode, decode_mxfp4, to_mx
from quantkit.formats.dtypes import FLOATS
from quantkit.formats.tiers import MXFP4, Tier, parse_tier
from quantkit.streaming.experts import plain_switch_linear
from quantkit.streaming.weight_loader import BLOCK_VALUES, Call, StreamedModule, Table


class _EnoughError(Exception):
    """The last layer has run; what the model does after it is not wanted."""


class StreamingModel:
    """mlx-lm's model of a source. Call it with tokens (batch, tokens) for logits."""

    def __init__(self, source: Source) -> None:
        """Raises SourceError for an architecture whose layers cannot be wrapped."""
        self.source = source
        self.weights = source.weights
        self._kept_shapes = {tensor.name: tensor.shape for tensor in source.inventory.kept}
        self._names = list(source.views)
        self.model = _build(source)
        self.model.eval()
        paths = {id(module): path for path, module in self.model.named_modules()}
        held = _list_of_layers(self.model)
        self.layers = [StreamedModule(m, paths[id(m)], self.fetch) for m in held]
        self.tables: dict[str, Table] = {}
        self._wrap_around()
        held[:] = self.layers

    def __call__(self, tokens: mx.array) -> mx.array:
        logits: mx.array = self.model(tokens)
        return logits

    def run(self, tokens: mx.array, seen: Callable[[int, Call, mx.array], None]) -> mx.array:
        """The output of the last layer (batch, tokens, hidden).

        `seen` is told the number of every layer, what it was called with and what it gave. Raises
        SourceError if the model does more between two layers than pass the one's output on, or if
        a layer gives NaN.
        """
        last: list[mx.array] = []

        def through(number: int, layer: StreamedModule) -> Callable[[Call], mx.array]:
            def run(call: Call) -> mx.array:
                self._require_passed_on(number, last, call)
                y = layer.run(call)
                if not mx.isfinite(y).all().item():
                    raise SourceError(
                        f"layer {number} ({layer.path}): its output is not finite. Is the "
                        "checkpoint damaged? Check its hashes."
                    )
                last[:] = [y]
                seen(number, call, y)
                if number == len(self.layers) - 1:
                    raise _EnoughError
                return y

            return run

        try:
            with self._instead([through(*numbered) for numbered in enumerate(self.layers)]):
                self.model(tokens)
        except _EnoughError:
            pass
        return last[0]

    def _require_passed_on(self, number: int, last: list[mx.array], call: Call) -> None:
        if last and not mx.array_equal(last[0], call.x):
            raise SourceError(
                f"{self.source.inventory.model_type}: does more between layers {number - 1} and "
                f"{number} than pass the output on; such models cannot be profiled."
            )

    def calls(self, tokens: mx.array) -> list[Call]:
        """What each layer is called with, none being run: all see the first one's input."""
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
        """Logits for `h`, the output of the last layer: all that the model does after it."""
        some = mx.zeros(h.shape[:2], mx.int32)
        with self._instead([lambda call: call.x] * (len(self.layers) - 1) + [lambda _: h]):
            logits: mx.array = self.model(some)
        return logits

    def head_block(self, h: mx.array, rows: range, tier: Tier | None = None) -> mx.array:
        """Logits of some rows of the vocabulary only, the head rounded to `tier`."""
        with self.tables[self.head_weight.name].seen_as(rows, tier):
            return self.head(h)

    def head_input(self, h: mx.array) -> mx.array:
        """What the head itself sees (batch, tokens, hidden) for `h`, the last layer's output."""
        self.head_block(h, range(1))
        (x,) = self.tables[self.head_weight.name].heard
        return x

    def embedded(self, tokens: mx.array, tiers: Mapping[str, Tier]) -> mx.array:
        """The first layer's input, embeddings rounded to `tiers`, by name."""
        with ExitStack() as stack:
            for name, tier in tiers.items():
                table = self.tables[name]
                stack.enter_context(table.seen_as(table.rows, tier))
            return self.calls(tokens)[0].x

    def behind_embedding(self, name: str, tokens: mx.array, g: mx.array) -> mx.array:
        """The gradient at the output of the embedding `name`, `g` being that at the first layer's
        input: models scale what is looked up, or add to it."""
        table = self.tables[name]

        def first(change: mx.array) -> mx.array:
            with table.moved_by(change):
                return self.calls(tokens)[0].x

        nothing = mx.zeros((*tokens.shape, table.weight.shape[-1]))
        _, (found,) = mx.vjp(first, [nothing], [g])
        return found

    def head_blocks(self, tokens: int) -> Iterator[range]:
        """The rows of the vocabulary in blocks that are small for so many tokens, too."""
        rows, width = self.head_weight.shape
        step = max(1, BLOCK_VALUES // max(width, tokens))
        for start in range(0, rows, step):
            yield range(start, min(start + step, rows))

    @property
    def head_weight(self) -> Weight:
        """The output head: the embedding itself where that is tied."""
        weights = [table.weight for table in self.tables.values()]
        heads = [weight for weight in weights if weight.role == "lm_head"]
        # Beside the vocabulary there may be a table of positions, which are fewer.
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
        """The parameters of the module at `path`, named relative to it, to compute with."""
        prefix = f"{path}."
        found = {}
        for name in self._names:
            if name.startswith(prefix):
                value = self.parameter(name)
                if value is not None:
                    mx.eval(value)  # or what it is computed from stays, of every weight at once
                    found[name[len(prefix) :]] = value
        return found

    def values(self, name: str, start: int = 0, stop: int | None = None) -> mx.array:
        """A weight's values (..., out, in), or some of its rows (rows, in), in its float type;
        those of affine tiers in float32, with scales and biases as kernels take them."""
        weight = self.weights[name]
        tier = parse_tier(weight.storage)
        whole = stop is None
        rows = (start, self.source.views[f"{name}.weight"].rows if stop is None else stop)
        if tier == MXFP4:
            packed, scales = (self.source.read(f"{name}.{p}", *rows) for p in ("weight", "scales"))
            values = decode_mxfp4(packed, scales)
        elif tier.quantized:
            values = decode(tuple(self._parts(name, *rows)), tier, "F32")
        else:
            values = to_mx(self.source.read(f"{name}.weight", *rows), tier.name.upper())
        return values.reshape(weight.shape) if whole else values

    def _parts(self, name: str, start: int, stop: int) -> Iterator[mx.array]:
        """Rows of the tensors that hold a packed weight; scales and biases in float32 if float."""
        for part in ("weight", "scales", "biases"):
            if (view := self.source.views.get(f"{name}.{part}")) is not None:
                values = to_mx(view.read(self.source.checkpoint, start, stop), view.dtype)
                yield values.astype(mx.float32) if view.dtype in FLOATS else values

    def _rows(self, name: str, part: str, start: int, stop: int) -> mx.array:
        if part == "weight":
            return self.values(name, start, stop)
        view = self.source.views[f"{name}.{part}"]
        return to_mx(self.source.read(f"{name}.{part}", 0, view.rows), view.dtype)[..., start:stop]

    def parameter(self, name: str) -> mx.array | None:
        """A stored tensor as the model computes with it; None for the scales of an unpacked one."""
        owner, _, part = name.rpartition(".")
        weight = self.weights.get(owner)
        held = weight is not None and part in ("weight", "scales", "biases")
        if weight is not None and held and not keeps_packed(weight):
            return self.values(owner).astype(mx.float32) if part == "weight" else None
        view = self.source.views[name]
        values = to_mx(self.source.read(name, 0, view.rows), view.dtype)
        if view.dtype in FLOATS:
            values = values.astype(mx.float32)
        if weight is not None and held:
            return values.reshape(*weight.shape[:-1], -1)
        return values.reshape(self._kept_shapes[name])

    def _wrap_around(self) -> None:
        """Wrap the leaf modules outside of the layers (embedding, norm, head)."""
        inside = tuple(f"{layer.path}." for layer in self.layers)
        owned = {name.rpartition(".")[0] for name in self._names}
        for path, module in list(self.model.named_modules()):
            if path in owned and not f"{path}.".startswith(inside):
                parent, _, name = path.rpartition(".")
                setattr(submodule(self.model, parent), name, self._wrapped(path, module))

    def _wrapped(self, path: str, module: Any) -> StreamedModule:
        weight = self.weights.get(path)
        if weight is not None and weight.role in ("embedding", "lm_head"):
            self.tables[path] = Table(module, weight, partial(self._rows, path))
            return self.tables[path]
        return StreamedModule(module, path, self.fetch)


def has_gradients(source: Source) -> bool:
    """Whether the installed mlx-lm differentiates the model: mixtures of experts from 0.32 on."""
    number = tuple(int(part) for part in version("mlx-lm").split(".")[:2])
    return not source.inventory.experts or number >= (0, 32)


def submodule(module: Any, path: str) -> Any:
    """The module at `path` inside of `module`; itself for an empty path."""
    for part in path.split(".") if path else ():
        if isinstance(module, list):
            module = module[int(part)]
        else:
            module = module[part] if part in module else getattr(module, part)
    return module


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


def _build(source: Source) -> Any:
    """mlx-lm's model with modules of the kinds that `StreamingModel.fetch` fills; nothing is
    evaluated."""
    from mlx.nn import quantize
    from mlx.utils import tree_unflatten
    from mlx_lm.models.switch_layers import SwitchLinear

    model = build_model(source.checkpoint.config)
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
