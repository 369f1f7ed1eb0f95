"""gpt-oss checkpoints: as published (MXFP4 experts), as BF16 fine-tunes write them, and under
mlx-lm's own names.

Published experts are `gate_up_proj_blocks` [E, 2I, H/32, 16] with `_scales` [E, 2I, H/32] and
`down_proj_blocks` [E, H, I/32, 16]: two FP4 values a byte, low nibble first, which read as
little-endian uint32 is mlx's own packing. Fine-tunes hold plain `gate_up_proj` [E, H, 2I] and
`down_proj` [E, I, H]. In both, gate and up alternate, gate first. mlx-lm writes `gate_proj`,
`up_proj` and `down_proj` apart, [E, out, in] each, in floats (`mlx_lm.fuse --dequantize`) or as
packed MXFP4 (`mlx_lm.convert` without -q).

This is the only place that spells gpt-oss names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.foreign import recognize_tensors
from quantkit.checkpoint.headers import StoredTensor
from quantkit.checkpoint.model_config import mlx_quantization
from quantkit.checkpoint.tensor_map import Layout, Place, config_int, float_storage
from quantkit.checkpoint.views import RowView, TransposedView, plain_view
from quantkit.errors import SourceError
from quantkit.formats.tiers import MXFP4, TensorSpec

MODEL_TYPE = "gpt_oss"
_BLOCK = 32  # values that share an MXFP4 scale


@dataclass(frozen=True)
class _Shape:
    """The dimensions that fix every tensor's shape."""

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
        """Attention's roles, each with its (out, in)."""
        kv = (self.keys, self.hidden)
        q, o = (self.queries, self.hidden), (self.hidden, self.queries)
        return ("q", q), ("k", kv), ("v", kv), ("o", o)


@dataclass(frozen=True)
class _Part:
    """One part of the model, whichever way it is stored.

    A `matrix` or `kept` tensor under its own name and `shape`; or `experts`, whose `projections`,
    each of `shape` [E, out, in], are stored as one interleaved stack.
    """

    form: Literal["matrix", "kept", "experts"]
    at: Place
    shape: tuple[int, ...]
    projections: tuple[str, ...] = ()

    @property
    def places(self) -> list[Place]:
        """Where mlx-lm's model has each projection of `experts`."""
        experts = self.at.name.rpartition(".")[0]
        return [
            replace(self.at, name=f"{experts}.{p}", role=f"expert_{p.removesuffix('_proj')}")
            for p in self.projections
        ]


def describe(checkpoint: Checkpoint) -> Layout:
    """Every tensor of a gpt-oss checkpoint under its mlx-lm name.

    Raises SourceError for a tensor that is missing, unknown, or of another type or shape than the
    config implies.
    """
    shape = _shape(checkpoint.config)
    reader = _Reader(checkpoint, shape)
    for part in _parts(shape):
        {"matrix": reader.matrix, "kept": reader.kept, "experts": reader.experts}[part.form](part)
    reader.require_all_used()
    return reader.layout


def is_native(checkpoint: Checkpoint) -> bool:
    """Return whether a gpt-oss checkpoint that mlx-lm wrote holds what was published: MXFP4 in the
    experts and floats elsewhere."""
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
    """Every tensor of a checkpoint with this config, in stored names, types and shapes.

    `packed` as published (MXFP4 experts), else as BF16 fine-tunes write them.
    """
    for part in _parts(_shape(config)):
        name = part.at.name
        if part.form == "matrix":
            yield TensorSpec(f"{name}.weight", "BF16", part.shape)
        elif part.form == "kept":
            yield TensorSpec(name, "BF16", part.shape)
        else:
            experts, n_out, n_in = part.shape
            rows = len(part.projections) * n_out
            if packed:
                groups = (experts, rows, n_in // _BLOCK)
                yield TensorSpec(f"{name}_blocks", "U8", (*groups, _BLOCK // 2))
                yield TensorSpec(f"{name}_scales", "U8", groups)
            else:
                yield TensorSpec(name, "BF16", (experts, n_in, rows))
            yield TensorSpec(f"{name}_bias", "BF16", (experts, rows))


def _parts(s: _Shape) -> Iterator[_Part]:
    """The model, in its own order: the one table of gpt-oss's names and shapes."""
    vocabulary = (s.vocabulary, s.hidden)
    yield _Part("matrix", Place("model.embed_tokens", "embedding"), vocabulary)
    for layer, kind in enumerate(s.kinds):
        at = f"model.layers.{layer}"

        def place(name: str, role: str, at: str = at, kind: str = kind, n: int = layer) -> Place:
            return Place(f"{at}.{name}", role, n, kind)

        yield _Part("kept", place("input_layernorm.weight", "other"), (s.hidden,))
        yield _Part("kept", place("post_attention_layernorm.weight", "other"), (s.hidden,))
        matrices = {f"self_attn.{role}_proj": (role, shape) for role, shape in s.projections}
        matrices["mlp.router"] = ("router", (s.experts, s.hidden))
        for name, (role, shape) in matrices.items():
            yield _Part("matrix", place(name, role), shape)
            yield _Part("kept", place(f"{name}.bias", role), shape[:1])
        yield _Part("kept", place("self_attn.sinks", "other"), (s.heads,))
        up, down = (s.intermediate, s.hidden), (s.hidden, s.intermediate)
        gate_up = ("gate_proj", "up_proj")
        yield _Part("experts", place("mlp.experts.gate_up_proj", ""), (s.experts, *up), gate_up)
        yield _Part(
            "experts", place("mlp.experts.down_proj", ""), (s.experts, *down), ("down_proj",)
        )
    yield _Part("kept", Place("model.norm.weight", "other"), (s.hidden,))
    yield _Part("matrix", Place("lm_head", "lm_head"), vocabulary)


def _shape(config: Mapping[str, Any]) -> _Shape:
    layers = config_int(config, "num_hidden_layers")
    head = config_int(config, "head_dim")
    kinds = config.get("layer_types") or ["sliding_attention", "full_attention"] * (layers // 2)
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise SourceError("config.json: layer_types is no list of names.")
    if len(kinds) != layers:
        raise SourceError(f"config.json: {len(kinds)} layer_types for {layers} layers.")
    heads = config_int(config, "num_attention_heads")
    return _Shape(
        layers=layers,
        experts=config_int(config, "num_local_experts"),
        hidden=config_int(config, "hidden_size"),
        intermediate=config_int(config, "intermediate_size"),
        vocabulary=config_int(config, "vocab_size"),
        queries=heads * head,
        keys=config_int(config, "num_key_value_heads") * head,
        heads=heads,
        kinds=tuple(kinds),
    )


class _Reader:
    """Takes tensors off the checkpoint's table, each checked, and adds them to the layout."""

    def __init__(self, checkpoint: Checkpoint, shape: _Shape) -> None:
        self.layout = Layout(shape.layers)
        self._left = dict(checkpoint.tensors)
        self._foreign = self._left.keys() - _every_name(shape)

    def matrix(self, part: _Part) -> None:
        tensor = self._take(f"{part.at.name}.weight", part.shape)
        self.layout.add_weight(part.at, part.shape, float_storage(tensor), plain_view(tensor))

    def kept(self, part: _Part) -> None:
        tensor = self._take(part.at.name, part.shape)
        float_storage(tensor)
        self.layout.add_unquantized(part.at, part.shape, plain_view(tensor))

    def experts(self, part: _Part) -> None:
        stored, stride = part.at.name, len(part.projections)
        experts, n_out, n_in = part.shape
        if f"{part.places[0].name}.weight" in self._left:
            for at in part.places:
                self._separate_projection(at, part.shape)
            return
        bias = self._take(f"{stored}_bias", (experts, stride * n_out))
        float_storage(bias)
        packed = f"{stored}_blocks" in self._left or f"{stored}_scales" in self._left
        if packed:
            blocks, scales = self._take_packed(stored, (experts, stride * n_out, n_in))
        else:
            plain = self._take(stored, (experts, n_in, stride * n_out))
        for offset, at in enumerate(part.places):
            rows = experts * n_out
            if packed:
                views = (
                    RowView(blocks, "U32", rows, n_in // 8, stride, offset),
                    RowView(scales, "U8", rows, n_in // _BLOCK, stride, offset),
                )
                self.layout.add_weight(at, part.shape, MXFP4, *views)
            else:
                view = TransposedView(plain, stride, offset)
                self.layout.add_weight(at, part.shape, float_storage(plain), view)
            bias_view = RowView(bias, bias.dtype, rows, 1, stride, offset)
            self.layout.add_unquantized(
                replace(at, name=f"{at.name}.bias"), (experts, n_out), bias_view
            )

    def _separate_projection(self, at: Place, shape: tuple[int, ...]) -> None:
        """Add a stack under mlx-lm's own name, in floats or in MXFP4 as mlx packs it."""
        *rows, n_in = shape
        if f"{at.name}.scales" in self._left:
            packed = self._take(f"{at.name}.weight", (*rows, n_in // 8), "U32")
            scales = self._take(f"{at.name}.scales", (*rows, n_in // _BLOCK), "U8")
            self.layout.add_weight(at, shape, MXFP4, plain_view(packed), plain_view(scales))
        else:
            plain = self._take(f"{at.name}.weight", shape)
            self.layout.add_weight(at, shape, float_storage(plain), plain_view(plain))
        self.kept(_Part("kept", replace(at, name=f"{at.name}.bias"), tuple(rows)))

    def _take_packed(
        self, stored: str, shape: tuple[int, int, int]
    ) -> tuple[StoredTensor, StoredTensor]:
        for part, other in (("_scales", "blocks"), ("_blocks", "scales")):
            if f"{stored}{part}" not in self._left:
                raise SourceError(
                    f"tensor '{stored}{part}' is missing, but its {other} are present. "
                    "Download the shards and the index again."
                )
        experts, n_out, n_in = shape
        if n_in % _BLOCK:
            raise SourceError(f"tensor '{stored}_blocks': {n_in} inputs are no multiple of 32.")
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
        if self._left:
            tensor = self._left[min(self._left)]
            raise SourceError(
                f"{tensor.file}: tensor {tensor.name!r} is not part of a gpt_oss model "
                f"(one of {len(self._left)} such); {self._explanation()}"
            )

    def _explanation(self) -> str:
        """What the tensors look like, and what to do: only a checkpoint that holds nothing else
        can have lost some on its way."""
        if known := recognize_tensors(self._foreign):
            return known
        if not self._foreign:
            return "download the shards and the index again."
        return (
            f"found {min(self._foreign)}, which no layout of gpt-oss has. quantkit reads the "
            "published one, transformers' and mlx-lm's."
        )


def _every_name(shape: _Shape) -> set[str]:
    """Return the name of every tensor in every layout of gpt-oss."""
    found = set()
    for part in _parts(shape):
        name = part.at.name
        if part.form != "experts":
            found.add(f"{name}.weight" if part.form == "matrix" else name)
            continue
        found |= {name, *(f"{name}_{end}" for end in ("blocks", "scales", "bias"))}
        for at in part.places:
            found |= {f"{at.name}.{end}" for end in ("weight", "scales", "bias")}
    return found
