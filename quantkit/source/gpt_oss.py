"""gpt-oss checkpoints: as published (MXFP4 experts) and as BF16 fine-tunes write them.

Published experts are `gate_up_proj_blocks` [E, 2I, H/32, 16] with `_scales` [E, 2I, H/32] and
`down_proj_blocks` [E, H, I/32, 16]: two FP4 values a byte, low nibble first, which read as
little-endian uint32 is mlx's own packing. Fine-tunes hold plain `gate_up_proj` [E, H, 2I] and
`down_proj` [E, I, H]. In both, gate and up alternate, gate first.

This is the only place that spells gpt-oss names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import SourceError
from quantkit.formats.tiers import MXFP4, TensorSpec
from quantkit.source.checkpoint import Checkpoint
from quantkit.source.headers import StoredTensor
from quantkit.source.layout import Layout, config_int, float_storage
from quantkit.source.views import RowView, TransposedView, plain_view

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
    def projections(self) -> dict[str, tuple[int, int]]:
        """Attention's (out, in) by role."""
        kv = (self.keys, self.hidden)
        return {
            "q": (self.queries, self.hidden),
            "k": kv,
            "v": kv,
            "o": (self.hidden, self.queries),
        }


def describe(checkpoint: Checkpoint) -> Layout:
    """Every tensor of a gpt-oss checkpoint under its mlx-lm name.

    Raises SourceError for a tensor that is missing, unknown, or of another type or shape than the
    config implies.
    """
    shape = _shape(checkpoint.config)
    reader = _Reader(checkpoint, Layout(shape.layers))
    reader.matrix("model.embed_tokens", "embedding", None, None, (shape.vocabulary, shape.hidden))
    for layer in range(shape.layers):
        _describe_layer(reader, shape, layer)
    reader.kept("model.norm.weight", "other", None, (shape.hidden,))
    reader.matrix("lm_head", "lm_head", None, None, (shape.vocabulary, shape.hidden))
    reader.require_all_used()
    return reader.layout


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


def _describe_layer(reader: "_Reader", s: _Shape, layer: int) -> None:
    at, kind = f"model.layers.{layer}", s.kinds[layer]
    reader.kept(f"{at}.input_layernorm.weight", "other", layer, (s.hidden,))
    for role, shape in s.projections.items():
        name = f"{at}.self_attn.{role}_proj"
        reader.matrix(name, role, layer, kind, shape)
        reader.kept(f"{name}.bias", role, layer, shape[:1])
    reader.kept(f"{at}.self_attn.sinks", "other", layer, (s.heads,))
    reader.kept(f"{at}.post_attention_layernorm.weight", "other", layer, (s.hidden,))
    reader.matrix(f"{at}.mlp.router", "router", layer, kind, (s.experts, s.hidden))
    reader.kept(f"{at}.mlp.router.bias", "router", layer, (s.experts,))
    experts = f"{at}.mlp.experts"
    up = (s.experts, s.intermediate, s.hidden)
    reader.experts(f"{experts}.gate_up_proj", ("gate_proj", "up_proj"), layer, kind, up)
    down = (s.experts, s.hidden, s.intermediate)
    reader.experts(f"{experts}.down_proj", ("down_proj",), layer, kind, down)


def stored_tensors(config: Mapping[str, Any], packed: bool = True) -> Iterator[TensorSpec]:
    """Every tensor of a checkpoint with this config, in stored names, types and shapes.

    `packed` as published (MXFP4 experts), else as BF16 fine-tunes write them.
    """
    s = _shape(config)
    yield TensorSpec("model.embed_tokens.weight", "BF16", (s.vocabulary, s.hidden))
    for layer in range(s.layers):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield TensorSpec(f"{at}.{norm}.weight", "BF16", (s.hidden,))
        matrices = {f"self_attn.{role}_proj": shape for role, shape in s.projections.items()}
        for name, shape in {**matrices, "mlp.router": (s.experts, s.hidden)}.items():
            yield TensorSpec(f"{at}.{name}.weight", "BF16", shape)
            yield TensorSpec(f"{at}.{name}.bias", "BF16", shape[:1])
        yield TensorSpec(f"{at}.self_attn.sinks", "BF16", (s.heads,))
        for name, n_out, n_in in (
            ("gate_up_proj", 2 * s.intermediate, s.hidden),
            ("down_proj", s.hidden, s.intermediate),
        ):
            stored = f"{at}.mlp.experts.{name}"
            if packed:
                groups = (s.experts, n_out, n_in // _BLOCK)
                yield TensorSpec(f"{stored}_blocks", "U8", (*groups, _BLOCK // 2))
                yield TensorSpec(f"{stored}_scales", "U8", groups)
            else:
                yield TensorSpec(stored, "BF16", (s.experts, n_in, n_out))
            yield TensorSpec(f"{stored}_bias", "BF16", (s.experts, n_out))
    yield TensorSpec("model.norm.weight", "BF16", (s.hidden,))
    yield TensorSpec("lm_head.weight", "BF16", (s.vocabulary, s.hidden))


class _Reader:
    """Takes tensors off the checkpoint's table, each checked, and adds them to the layout."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout) -> None:
        self.layout = layout
        self._left = dict(checkpoint.tensors)

    def matrix(
        self, name: str, role: str, layer: int | None, kind: str | None, shape: tuple[int, ...]
    ) -> None:
        tensor = self._take(f"{name}.weight", shape)
        storage = float_storage(tensor)
        self.layout.add_weight(name, role, layer, kind, shape, storage, plain_view(tensor))

    def kept(self, name: str, role: str, layer: int | None, shape: tuple[int, ...]) -> None:
        tensor = self._take(name, shape)
        float_storage(tensor)
        self.layout.add_kept(name, role, layer, shape, plain_view(tensor))

    def experts(
        self,
        stored: str,
        names: tuple[str, ...],
        layer: int,
        kind: str,
        shape: tuple[int, int, int],
    ) -> None:
        """A stored stack that holds `names` interleaved; `shape` [E, out, in] is that of each."""
        stride, (experts, n_out, n_in) = len(names), shape
        bias = self._take(f"{stored}_bias", (experts, stride * n_out))
        float_storage(bias)
        packed = f"{stored}_blocks" in self._left or f"{stored}_scales" in self._left
        if packed:
            blocks, scales = self._take_packed(stored, (experts, stride * n_out, n_in))
        else:
            plain = self._take(stored, (experts, n_in, stride * n_out))
        for offset, projection in enumerate(names):
            name = f"{stored.rpartition('.')[0]}.{projection}"
            role = f"expert_{projection.removesuffix('_proj')}"
            rows = experts * n_out
            if packed:
                views = (
                    RowView(blocks, "U32", rows, n_in // 8, stride, offset),
                    RowView(scales, "U8", rows, n_in // _BLOCK, stride, offset),
                )
                self.layout.add_weight(name, role, layer, kind, shape, MXFP4, *views)
            else:
                view = TransposedView(plain, stride, offset)
                self.layout.add_weight(name, role, layer, kind, shape, float_storage(plain), view)
            bias_view = RowView(bias, bias.dtype, rows, 1, stride, offset)
            self.layout.add_kept(f"{name}.bias", role, layer, (experts, n_out), bias_view)

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
                f"tensor {name!r} is missing: not a complete gpt_oss checkpoint. "
                "Download the shards and the index again."
            )
        if tensor.shape != shape:
            raise SourceError(
                f"{tensor.file}: tensor {name!r} has shape {list(tensor.shape)}, "
                f"but config.json implies {list(shape)}."
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
                f"(one of {len(self._left)} such)."
            )
