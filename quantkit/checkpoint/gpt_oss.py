"""gpt-oss checkpoints: as published (MXFP4 experts), as BF16 fine-tunes, and as mlx-lm writes them.

Published experts are `gate_up_proj_blocks` [E, 2I, H/32, 16] with `_scales` [E, 2I, H/32] and
`down_proj_blocks` [E, H, I/32, 16]: two FP4 values a byte, low nibble first, which as little-endian
uint32 is mlx's packing. Fine-tunes have plain `gate_up_proj` [E, H, 2I] and `down_proj` [E, I, H].
In both, gate and up alternate, gate first. mlx-lm writes separate `gate_proj`, `up_proj` and
`down_proj`, each [E, out, in], in floats (`mlx_lm.fuse --dequantize`) or as packed MXFP4
(`mlx_lm.convert` without -q).

Only this module spells gpt-oss names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.foreign import recognize_tensors
from quantkit.checkpoint.headers import StoredTensor
from quantkit.checkpoint.model_config import ModelConfig, mlx_quantization
from quantkit.checkpoint.tensor_map import Layout, Place, float_storage
from quantkit.checkpoint.views import RowView, TransposedView, plain_view
from quantkit.errors import SourceError
from quantkit.formats.tiers import MXFP4, TensorSpec
from quantkit.units import like_others

MODEL_TYPE = "gpt_oss"
_BLOCK = 32  # values that share an MXFP4 scale


@dataclass(frozen=True)
class _Shape:
    """The dimensions that determine the shape of every tensor."""

    layers: int
    experts: int
    hidden: int
    intermediate: int
    vocabulary: int
    queries: int
    keys: int
    heads: int
    kinds: tuple[str, ...]

    @property
    def projections(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        """The roles of attention, each with its (out, in)."""
        kv = (self.keys, self.hidden)
        q, o = (self.queries, self.hidden), (self.hidden, self.queries)
        return ("q", q), ("k", kv), ("v", kv), ("o", o)


@dataclass(frozen=True)
class _Module:
    """A tensor or stack of the model, in any of its layouts.

    A `matrix` or `unquantized` tensor has its own name and `shape`. The `projections` of `experts`,
    each of `shape` [E, out, in], are stored as one interleaved stack.
    """

    form: Literal["matrix", "unquantized", "experts"]
    at: Place
    shape: tuple[int, ...]
    projections: tuple[str, ...] = ()

    @property
    def places(self) -> list[Place]:
        """The places of the projections of `experts` in mlx-lm's model."""
        experts = self.at.name.rpartition(".")[0]
        return [
            replace(self.at, name=f"{experts}.{p}", role=f"expert_{p.removesuffix('_proj')}")
            for p in self.projections
        ]


def describe(checkpoint: Checkpoint) -> Layout:
    """Return the layout of a gpt-oss checkpoint.

    Raises SourceError for a missing or unknown tensor, or one whose type or shape contradicts the
    config.
    """
    shape = _shape(checkpoint.config)
    reader = _Reader(checkpoint, shape)
    for module in _modules(shape):
        {"matrix": reader.matrix, "unquantized": reader.unquantized, "experts": reader.experts}[
            module.form
        ](module)
    reader.require_all_used()
    return reader.layout


def is_native(checkpoint: Checkpoint) -> bool:
    """Return whether mlx-lm wrote a gpt-oss checkpoint without quantizing it further.

    That is, with MXFP4 in the experts and floats elsewhere.
    """
    names = checkpoint.tensors
    scales = [name.removesuffix(".scales") for name in names if name.endswith(".scales")]
    quantization = mlx_quantization(checkpoint.config) or {}
    if any(name.endswith(".biases") for name in names):
        return False
    entries = [quantization.get(path) or quantization for path in scales] or [quantization]
    packed = MXFP4.config_entry().items()
    return all(".mlp.experts." in path for path in scales) and all(
        isinstance(entry, Mapping) and packed <= entry.items() for entry in entries
    )


def stored_tensors(config: Mapping[str, Any], packed: bool = True) -> Iterator[TensorSpec]:
    """Yield every tensor of a checkpoint with this config, in stored names, types and shapes.

    `packed` yields the published layout (MXFP4 experts), otherwise the layout of BF16 fine-tunes.
    """
    for module in _modules(_shape(config)):
        name = module.at.name
        if module.form == "matrix":
            yield TensorSpec(f"{name}.weight", "BF16", module.shape)
        elif module.form == "unquantized":
            yield TensorSpec(name, "BF16", module.shape)
        else:
            experts, n_out, n_in = module.shape
            rows = len(module.projections) * n_out
            if packed:
                groups = (experts, rows, n_in // _BLOCK)
                yield TensorSpec(f"{name}_blocks", "U8", (*groups, _BLOCK // 2))
                yield TensorSpec(f"{name}_scales", "U8", groups)
            else:
                yield TensorSpec(name, "BF16", (experts, n_in, rows))
            yield TensorSpec(f"{name}_bias", "BF16", (experts, rows))


def _modules(s: _Shape) -> Iterator[_Module]:
    """Yield the model in its own order: the one table of gpt-oss's names and shapes."""
    vocabulary = (s.vocabulary, s.hidden)
    yield _Module("matrix", Place("model.embed_tokens", "embedding"), vocabulary)
    for layer, kind in enumerate(s.kinds):
        at = f"model.layers.{layer}"

        def place(name: str, role: str, at: str = at, kind: str = kind, n: int = layer) -> Place:
            return Place(f"{at}.{name}", role, n, kind)

        yield _Module("unquantized", place("input_layernorm.weight", "other"), (s.hidden,))
        yield _Module("unquantized", place("post_attention_layernorm.weight", "other"), (s.hidden,))
        matrices = {f"self_attn.{role}_proj": (role, shape) for role, shape in s.projections}
        matrices["mlp.router"] = ("router", (s.experts, s.hidden))
        for name, (role, shape) in matrices.items():
            yield _Module("matrix", place(name, role), shape)
            yield _Module("unquantized", place(f"{name}.bias", role), shape[:1])
        yield _Module("unquantized", place("self_attn.sinks", "other"), (s.heads,))
        up, down = (s.intermediate, s.hidden), (s.hidden, s.intermediate)
        gate_up = ("gate_proj", "up_proj")
        yield _Module("experts", place("mlp.experts.gate_up_proj", ""), (s.experts, *up), gate_up)
        yield _Module(
            "experts", place("mlp.experts.down_proj", ""), (s.experts, *down), ("down_proj",)
        )
    yield _Module("unquantized", Place("model.norm.weight", "other"), (s.hidden,))
    yield _Module("matrix", Place("lm_head", "lm_head"), vocabulary)


def _shape(config: Mapping[str, Any]) -> _Shape:
    settings = ModelConfig.parse(config)
    layers, head = settings.require("layers"), settings.require("head_dim")
    kinds = config.get("layer_types") or ["sliding_attention", "full_attention"] * (layers // 2)
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise SourceError("config.json: layer_types is not a list of names.")
    if len(kinds) != layers:
        raise SourceError(f"config.json: {len(kinds)} layer_types for {layers} layers.")
    heads = settings.require("heads")
    return _Shape(
        layers=layers,
        experts=settings.require("experts"),
        hidden=settings.require("hidden_size"),
        intermediate=settings.require("intermediate_size"),
        vocabulary=settings.require("vocabulary"),
        queries=heads * head,
        keys=settings.require("key_value_heads") * head,
        heads=heads,
        kinds=tuple(kinds),
    )


class _Reader:
    """Takes tensors from the checkpoint's table, checks them, and adds them to the layout."""

    def __init__(self, checkpoint: Checkpoint, shape: _Shape) -> None:
        self.layout = Layout(shape.layers)
        self._left = dict(checkpoint.tensors)
        self._foreign = self._left.keys() - _every_name(shape)

    def matrix(self, module: _Module) -> None:
        """Add a matrix."""
        tensor = self._take(f"{module.at.name}.weight", module.shape)
        self.layout.add_weight(module.at, module.shape, float_storage(tensor), plain_view(tensor))

    def unquantized(self, module: _Module) -> None:
        """Add an unquantized tensor."""
        tensor = self._take(module.at.name, module.shape)
        float_storage(tensor)
        self.layout.add_unquantized(module.at, module.shape, plain_view(tensor))

    def experts(self, module: _Module) -> None:
        """Add the projections of a stack of experts."""
        stored, stride = module.at.name, len(module.projections)
        experts, n_out, n_in = module.shape
        if f"{module.places[0].name}.weight" in self._left:
            for at in module.places:
                self._separate_projection(at, module.shape)
            return
        bias = self._take(f"{stored}_bias", (experts, stride * n_out))
        float_storage(bias)
        packed = f"{stored}_blocks" in self._left or f"{stored}_scales" in self._left
        if packed:
            blocks, scales = self._take_packed(stored, (experts, stride * n_out, n_in))
        else:
            plain = self._take(stored, (experts, n_in, stride * n_out))
        for offset, at in enumerate(module.places):
            rows = experts * n_out
            if packed:
                views = (
                    RowView(blocks, "U32", rows, n_in // 8, stride, offset),
                    RowView(scales, "U8", rows, n_in // _BLOCK, stride, offset),
                )
                self.layout.add_weight(at, module.shape, MXFP4, *views)
            else:
                view = TransposedView(plain, stride, offset)
                self.layout.add_weight(at, module.shape, float_storage(plain), view)
            bias_view = RowView(bias, bias.dtype, rows, 1, stride, offset)
            self.layout.add_unquantized(
                replace(at, name=f"{at.name}.bias"), (experts, n_out), bias_view
            )

    def _separate_projection(self, at: Place, shape: tuple[int, ...]) -> None:
        """Add a stack under mlx-lm's name, in floats or in packed MXFP4."""
        *rows, n_in = shape
        if f"{at.name}.scales" in self._left:
            packed = self._take(f"{at.name}.weight", (*rows, n_in // 8), "U32")
            scales = self._take(f"{at.name}.scales", (*rows, n_in // _BLOCK), "U8")
            self.layout.add_weight(at, shape, MXFP4, plain_view(packed), plain_view(scales))
        else:
            plain = self._take(f"{at.name}.weight", shape)
            self.layout.add_weight(at, shape, float_storage(plain), plain_view(plain))
        self.unquantized(_Module("unquantized", replace(at, name=f"{at.name}.bias"), tuple(rows)))

    def _take_packed(
        self, stored: str, shape: tuple[int, int, int]
    ) -> tuple[StoredTensor, StoredTensor]:
        for module, other in (("_scales", "blocks"), ("_blocks", "scales")):
            if f"{stored}{module}" not in self._left:
                raise SourceError(
                    f"tensor '{stored}{module}' is missing, but its {other} are present. "
                    "Download the shards and the index again."
                )
        experts, n_out, n_in = shape
        if n_in % _BLOCK:
            raise SourceError(f"tensor '{stored}_blocks': {n_in} inputs are not a multiple of 32.")
        groups = n_in // _BLOCK
        blocks = self._take(f"{stored}_blocks", (experts, n_out, groups, _BLOCK // 2), "U8")
        return blocks, self._take(f"{stored}_scales", (experts, n_out, groups), "U8")

    def _take(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> StoredTensor:
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise SourceError(
                f"tensor {name!r} is missing: not a complete gpt_oss checkpoint; "
                f"{self._explanation()}"
            )
        if tensor.shape != shape:
            raise SourceError(
                f"{tensor.file}: tensor {name!r} has shape {list(tensor.shape)}, but config.json "
                f"implies {list(shape)}."
            )
        if dtype is not None and tensor.dtype != dtype:
            raise SourceError(
                f"{tensor.file}: tensor {name!r} is {tensor.dtype}, expected {dtype}."
            )
        return tensor

    def require_all_used(self) -> None:
        """Check that no tensor is left. Raises SourceError."""
        if self._left:
            tensor = self._left[min(self._left)]
            raise SourceError(
                f"{tensor.file}: tensor {tensor.name!r} is not part of a gpt_oss model"
                f"{like_others(len(self._left))}; {self._explanation()}"
            )

    def _explanation(self) -> str:
        """Explain missing or extra tensors.

        A checkpoint without foreign names has lost tensors in transfer.
        """
        if explanation := recognize_tensors(self._foreign):
            return explanation
        if not self._foreign:
            return "download the shards and the index again."
        return (
            f"found {min(self._foreign)}, which belongs to no layout of gpt-oss. quantkit reads "
            "the published layout, and the layouts of transformers and mlx-lm."
        )


def _every_name(shape: _Shape) -> set[str]:
    """Return the name of every tensor in every layout of gpt-oss."""
    names = set()
    for module in _modules(shape):
        name = module.at.name
        if module.form != "experts":
            names.add(f"{name}.weight" if module.form == "matrix" else name)
            continue
        names |= {name, *(f"{name}_{end}" for end in ("blocks", "scales", "bias"))}
        for at in module.places:
            names |= {f"{at.name}.{end}" for end in ("weight", "scales", "bias")}
    return names
