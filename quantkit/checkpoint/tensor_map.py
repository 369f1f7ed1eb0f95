"""What a layout says of a checkpoint: its tensors in mlx-lm's names, and where they lie."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quantkit.artifacts.inventory import UnquantizedTensor, Weight
from quantkit.checkpoint.headers import StoredTensor
from quantkit.checkpoint.views import CastView, View
from quantkit.errors import SourceError
from quantkit.formats.dtypes import FLOATS, nbytes
from quantkit.formats.tiers import Tier, parse_tier

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token")


@dataclass(frozen=True)
class Place:
    """Where in the model something is: its mlx-lm path, what it is for, its layer and its kind."""

    name: str
    role: str
    layer: int | None = None
    kind: str | None = None


@dataclass
class Layout:
    """Weights and kept tensors found so far, and a view for every mlx-lm tensor name."""

    layers: int
    weights: list[Weight] = field(default_factory=list)
    kept: list[UnquantizedTensor] = field(default_factory=list)
    views: dict[str, View] = field(default_factory=dict)
    may_cast: Callable[[str], bool] = lambda _name: True  # mlx-lm's `cast_predicate`

    def add_weight(
        self,
        at: Place,
        shape: tuple[int, ...],
        storage: Tier,
        *views: View,
        dtype: str | None = None,
    ) -> None:
        """A weight whose tensors (weight, and scales and biases where packed) are `views`, in that
        order; `dtype` is the float type of affine scales, where it is not that of the weight."""
        dtype = dtype or (storage.name.upper() if storage.mode == "float" else "BF16")
        specs = storage.tensors(at.name, shape, dtype)
        stored = sum(spec.nbytes for spec in specs)
        self.weights.append(
            Weight(at.name, at.role, at.layer, at.kind, shape, storage.name, stored, dtype)
        )
        self.views.update(zip((spec.name for spec in specs), views, strict=True))

    def add_unquantized(self, at: Place, shape: tuple[int, ...], view: View) -> None:
        """A tensor stored as it is."""
        stored = nbytes(view.dtype, shape)
        self.kept.append(UnquantizedTensor(at.name, at.role, at.layer, view.dtype, shape, stored))
        self.views[at.name] = view


def cast_floats(layout: Layout, dtype: str | None) -> None:
    """Give the floats of `layout` one type, in place, as `mlx_lm.convert` does.

    `dtype` is BF16, F16 or F32; None means the type of most values, that of MXFP4 being BF16.
    Tensors of several types make stock mlx-lm compute, and keep its cache, in the widest.
    """
    dtype = dtype or _most_common_dtype(layout)
    for number, weight in enumerate(layout.weights):
        name, storage = f"{weight.name}.weight", parse_tier(weight.storage)
        if not layout.may_cast(name):
            continue
        if storage.mode == "float" and weight.dtype != dtype:
            layout.views[name] = CastView(layout.views[name], dtype)
            stored = nbytes(dtype, weight.shape)
            weight = replace(weight, storage=dtype.lower(), bytes=stored)
        layout.weights[number] = replace(weight, dtype=dtype)
    for number, tensor in enumerate(layout.kept):
        if tensor.dtype in FLOATS and tensor.dtype != dtype and layout.may_cast(tensor.name):
            layout.views[tensor.name] = CastView(layout.views[tensor.name], dtype)
            stored = nbytes(dtype, tensor.shape)
            layout.kept[number] = replace(tensor, dtype=dtype, bytes=stored)


def _most_common_dtype(layout: Layout) -> str:
    held: Counter[str] = Counter({"BF16": 0})
    for weight in layout.weights:
        held[weight.dtype] += weight.parameters
    return max(held, key=lambda dtype: held[dtype])


def config_int(config: Mapping[str, Any], *keys: str) -> int:
    """The first of `keys` that the config has, a positive integer. Raises SourceError."""
    value = optional_int(config, *keys)
    if value is None:
        raise SourceError(f"config.json: {keys[0]!r} is missing or no positive integer.")
    return value


def optional_int(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of `keys` that is a positive integer, else None."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def experts_of(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """(experts per layer, experts per token), None where the config does not say."""
    scope = text_scope(config)
    return optional_int(scope, *_EXPERTS), optional_int(scope, *_EXPERTS_PER_TOKEN)


def text_scope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model: those of `text_config` first, where there is one."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def float_storage(tensor: StoredTensor) -> Tier:
    """The tier of a float tensor. Raises SourceError for any other element type."""
    if tensor.dtype not in FLOATS:
        raise SourceError(
            f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}; expected BF16, F16 or F32."
        )
    return parse_tier(tensor.dtype)
