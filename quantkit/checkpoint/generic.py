"""Any architecture of mlx-lm: names, shapes and values come from the model class's `sanitize`.

Shapes come from running `sanitize` on lazy placeholders that are never evaluated. A tensor that
`sanitize` returns unchanged is read in rows from its shard; a computed one (stacked experts, split
or renamed tensors) is evaluated whole, one at a time.

Repos quantized by mlx are supported, too: their packed modules have scales. gpt-oss as published
needs none of this, so that only other models import mlx here.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from quantkit.backend import mx
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.foreign import recognize_tensors
from quantkit.checkpoint.model_config import mlx_quantization
from quantkit.checkpoint.tensor_map import Layout, Place
from quantkit.checkpoint.views import ComputedView, View, plain_view
from quantkit.errors import SourceError
from quantkit.formats.codec import to_numpy
from quantkit.formats.dtypes import FLOATS
from quantkit.formats.tiers import TIERS, Tier, parse_tier
from quantkit.units import like_others

_DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
}
# Exceptions of model code on unexpected configs or tensors.
_MODEL_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass
class _Sanitized:
    """Lazy values under mlx-lm's names, evaluated and released one by one."""

    checkpoint: Checkpoint
    _lazy: dict[str, mx.array] = field(default_factory=dict)
    _last: tuple[str, np.ndarray] | None = None

    def compute(self, name: str) -> np.ndarray:
        """Return a whole tensor, of the model's shape, as a numpy carrier."""
        if self._last is None or self._last[0] != name:
            self._last = None
            if name not in self._lazy:
                self._lazy = self._load()
            self._last = (name, to_numpy(self._lazy.pop(name)))
            mx.clear_cache()
        return self._last[1]

    def _load(self) -> dict[str, mx.array]:
        stored: dict[str, mx.array] = {}
        for file in self.checkpoint.files:
            loaded = mx.load(str(self.checkpoint.path(file.name)))
            assert isinstance(loaded, dict)
            stored.update(loaded)
        return _Model(self.checkpoint).sanitize(stored)


def build_model(config: Mapping[str, Any]) -> Any:
    """Build mlx-lm's model for a config, without evaluating it. Raises SourceError."""
    from mlx_lm.utils import _get_classes

    config = deepcopy(dict(config))  # args classes edit their input
    try:
        model_class, args_class = _get_classes(config)
        return model_class(args_class.from_dict(config))
    except _MODEL_ERRORS as exc:
        raise SourceError(
            f"config.json: mlx-lm cannot build model_type {config.get('model_type')!r} "
            f"from it ({exc})."
        ) from exc


def loadable_model(checkpoint: Checkpoint) -> Any:
    """Build mlx-lm's model of a checkpoint as loading leaves it, without evaluating it.

    Loading may change it: only from the tensors does Gemma 3's class learn that its head is the
    embedding. Raises SourceError.
    """
    model = _Model(checkpoint)
    model.sanitize(_placeholders(checkpoint))
    return model.model


class _Model:
    """The mlx-lm model of a checkpoint, built but never evaluated."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model = build_model(checkpoint.config)

    def sanitize(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return arrays of any shape under mlx-lm's names. Raises SourceError."""
        if not hasattr(self.model, "sanitize"):
            return arrays
        try:
            return dict(self.model.sanitize(arrays))
        except _MODEL_ERRORS as exc:
            raise SourceError(
                f"mlx-lm's {self.model.model_type} model does not recognise these tensors "
                f"({type(exc).__name__}: {exc}); "
                f"{recognize_tensors(arrays) or 'is the checkpoint complete?'}"
            ) from exc

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, in the order of the model."""
        from mlx.utils import tree_flatten

        return {name: tuple(array.shape) for name, array in tree_flatten(self.model.parameters())}

    def quantizable(self) -> Iterator[tuple[str, Any]]:
        """Yield (path, module) of every module that mlx-lm can quantize."""
        predicate = getattr(self.model, "quant_predicate", None)
        for path, module in self.model.named_modules():
            if not hasattr(module, "to_quantized") or "weight" not in module:
                continue
            if predicate is None or predicate(path, module) is not False:
                yield path, module


def describe(checkpoint: Checkpoint) -> Layout:
    """Return the layout of a checkpoint.

    Raises SourceError for a model_type unknown to mlx-lm, or a checkpoint that it would not load.
    """
    model = _Model(checkpoint)
    placeholders = _placeholders(checkpoint)
    stored_name = {id(array): name for name, array in placeholders.items()}
    arrays = model.sanitize(dict(placeholders))
    packed = _packed(checkpoint, arrays)
    _require_loadable(arrays, model.shapes, packed)
    values = _Sanitized(checkpoint)

    def view(name: str) -> View:
        array = arrays[name]
        if (stored := stored_name.get(id(array))) is not None:
            return plain_view(checkpoint.tensors[stored])
        width = array.shape[-1] if array.shape else 1
        rows = array.size // width if width else 0
        return ComputedView(name, _NAMES[array.dtype], rows, width, values.compute)

    layout = _layout(checkpoint, model, arrays, packed, view)
    layout.may_cast = getattr(model.model, "cast_predicate", layout.may_cast)
    return layout


def _packed(checkpoint: Checkpoint, arrays: dict[str, mx.array]) -> dict[str, Tier]:
    """Return the tier of every packed module by its path, as mlx-lm would infer it."""
    tiers = {}
    entries = mlx_quantization(checkpoint.config) or {}
    for path in (name.removesuffix(".scales") for name in arrays if name.endswith(".scales")):
        entry = entries[path] if isinstance(entries.get(path), dict) else entries
        wanted = {"mode": "affine"} | {
            key: entry[key] for key in ("group_size", "bits", "mode") if key in entry
        }
        matching = [t for t in TIERS.values() if t.quantized and t.config_entry() == wanted]
        if not matching or f"{path}.weight" not in arrays:
            raise SourceError(f"config.json: {path} has scales, but {wanted} is not a tier.")
        tiers[path] = matching[0]
    return tiers


def _layout(
    checkpoint: Checkpoint,
    model: _Model,
    arrays: dict[str, mx.array],
    packed: dict[str, Tier],
    view: Callable[[str], View],
) -> Layout:
    modules = {
        path: module
        for path, module in model.quantizable()
        if _NAMES[arrays[f"{path}.weight"].dtype] in FLOATS
    }
    every = dict(model.model.named_modules())
    modules |= {path: every[path] for path in packed}
    numbered = [layer for path in modules if (layer := layer_of(path)) is not None]
    kinds = checkpoint.settings.layer_types
    layout = Layout(checkpoint.settings.layers or max(numbered, default=-1) + 1)
    for name, shape in model.shapes.items():
        path = name.rpartition(".")[0]
        layer = layer_of(name)
        role = role_of(path, modules[path]) if path in modules else "other"
        if path in modules and name == f"{path}.weight":
            kind = kinds[layer] if layer is not None and layer < len(kinds) else None
            at = Place(path, role, layer, kind)
            if path in packed:
                _add_packed(layout, at, shape, packed[path], arrays, view)
            else:
                layout.add_weight(at, shape, parse_tier(_NAMES[arrays[name].dtype]), view(name))
        else:
            layout.add_unquantized(Place(name, role, layer), shape, view(name))
    return layout


def _add_packed(
    layout: Layout,
    at: Place,
    shape: tuple[int, ...],
    tier: Tier,
    arrays: dict[str, mx.array],
    view: Callable[[str], View],
) -> None:
    dtype = _NAMES[arrays[f"{at.name}.scales"].dtype] if tier.mode == "affine" else "BF16"
    specs = tier.tensors(at.name, shape, dtype)
    for spec in specs:
        array = arrays.get(spec.name)
        if array is None or tuple(array.shape) != spec.shape:
            raise SourceError(
                f"tensor {spec.name!r} is {'missing' if array is None else list(array.shape)}; "
                f"tier {tier} needs {list(spec.shape)}."
            )
    layout.add_weight(at, shape, tier, *(view(spec.name) for spec in specs), dtype=dtype)


def _placeholders(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """Return lazy arrays in place of all stored tensors."""
    return {t.name: _placeholder(t.dtype, t.shape) for t in checkpoint.tensors.values()}


def _placeholder(dtype: str, shape: tuple[int, ...]) -> mx.array:
    if dtype not in _DTYPES:
        raise SourceError(
            f"tensors of type {dtype} cannot be read: start from a BF16 or F16 checkpoint."
        )
    return mx.zeros(shape, _DTYPES[dtype])


def _require_loadable(
    arrays: dict[str, mx.array], shapes: dict[str, tuple[int, ...]], packed: dict[str, Tier]
) -> None:
    paths = {path for path in packed if f"{path}.weight" in shapes}
    of_packed = {f"{path}.{end}" for path in paths for end in ("weight", "scales", "biases")}
    shapes = {name: shape for name, shape in shapes.items() if name not in of_packed}
    arrays = {name: array for name, array in arrays.items() if name not in of_packed}
    missing, unknown = shapes.keys() - arrays.keys(), arrays.keys() - shapes.keys()
    for names, fault in ((missing, "is missing"), (unknown, "is not part of the model")):
        if names:
            advice = recognize_tensors(unknown)
            if advice is None and missing and unknown:
                advice = f"found {min(unknown)}, which is not part of the model."
            raise SourceError(
                f"tensor {min(names)!r} {fault}{like_others(len(names))}: "
                f"mlx-lm would not load this checkpoint{f'; {advice}' if advice else '.'}"
            )
    for name, shape in shapes.items():
        if tuple(arrays[name].shape) != shape:
            raise SourceError(
                f"tensor {name!r} has shape {list(arrays[name].shape)}, but config.json implies "
                f"{list(shape)}."
            )


_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_PROJECTIONS = {
    "q": {"q_proj", "wq", "query", "q_a_proj", "q_b_proj"},
    "k": {"k_proj", "wk", "key"},
    "v": {"v_proj", "wv", "value"},
    "o": {"o_proj", "wo", "out_proj"},
    "mlp_gate": {"gate_proj", "w1", "gate_up_proj"},
    "mlp_up": {"up_proj", "w3", "fc1", "c_fc"},
    "mlp_down": {"down_proj", "w2", "fc2"},
}
_ROLE_OF_NAME = {name: role for role, names in _PROJECTIONS.items() for name in names}


def layer_of(path: str) -> int | None:
    """Return the layer number in a module path, None outside the layers."""
    match = _LAYER.search(path)
    return int(match.group(1)) if match else None


def role_of(path: str, module: Any) -> str:
    """Return the role of a quantizable module, from its class and the last name of its path."""
    from mlx.nn import Embedding
    from mlx_lm.models.switch_layers import SwitchLinear

    last = path.rpartition(".")[2]
    role = _ROLE_OF_NAME.get(last, "other")
    if isinstance(module, SwitchLinear):
        return role.replace("mlp_", "expert_") if role.startswith("mlp_") else "other"
    if isinstance(module, Embedding):
        return "embedding"
    if last in ("lm_head", "embed_out") or path == "output":
        return "lm_head"
    if last in ("router", "gate", "shared_expert_gate") or ".router." in path:
        return "router"
    return role
