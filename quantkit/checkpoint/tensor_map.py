"""The layout of a checkpoint: its tensors under mlx-lm's names, and a view of each."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from quantkit.artifacts.inventory import UnquantizedTensor, Weight
from quantkit.checkpoint.headers import StoredTensor
from quantkit.checkpoint.views import CastView, View
from quantkit.errors import SourceError
from quantkit.formats.dtypes import FLOATS, nbytes
from quantkit.formats.tiers import Tier, parse_tier


@dataclass(frozen=True)
class Place:
    """The place of a tensor in the model: its mlx-lm path, role, layer, and kind of layer."""

    name: str
    role: str
    layer: int | None = None
    kind: str | None = None


@dataclass
class Layout:
    """Weights and unquantized tensors, and a view for every mlx-lm tensor name."""

    layers: int
    weights: list[Weight] = field(default_factory=list)
    unquantized: list[UnquantizedTensor] = field(default_factory=list)
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
        """Add a weight with the `views` of its tensors (weight, and scales and biases if packed).

        `dtype` is the float type of affine scales, if it differs from the type of the weight.
        """
        dtype = dtype or (storage.name.upper() if storage.mode == "float" else "BF16")
        specs = storage.tensors(at.name, shape, dtype)
        stored = sum(spec.nbytes for spec in specs)
        self.weights.append(
            Weight(at.name, at.role, at.layer, at.kind, shape, storage.name, stored, dtype)
        )
        self.views.update(zip((spec.name for spec in specs), views, strict=True))

    def add_unquantized(self, at: Place, shape: tuple[int, ...], view: View) -> None:
        """Add an unquantized tensor."""
        stored = nbytes(view.dtype, shape)
        self.unquantized.append(
            UnquantizedTensor(at.name, at.role, at.layer, view.dtype, shape, stored)
        )
        self.views[at.name] = view


def cast_floats(layout: Layout, dtype: str | None) -> None:
    """Cast the floats of `layout` to one type, in place, as `mlx_lm.convert` does.

    `dtype` is BF16, F16 or F32; None means the type of most values, MXFP4 counting as BF16. With
    mixed types, stock mlx-lm computes and caches in the widest.
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
    for number, tensor in enumerate(layout.unquantized):
        if tensor.dtype in FLOATS and tensor.dtype != dtype and layout.may_cast(tensor.name):
            layout.views[tensor.name] = CastView(layout.views[tensor.name], dtype)
            stored = nbytes(dtype, tensor.shape)
            layout.unquantized[number] = replace(tensor, dtype=dtype, bytes=stored)


def _most_common_dtype(layout: Layout) -> str:
    values: Counter[str] = Counter({"BF16": 0})
    for weight in layout.weights:
        values[weight.dtype] += weight.parameters
    return max(values, key=lambda dtype: values[dtype])


def float_storage(tensor: StoredTensor) -> Tier:
    """Return the tier of a float tensor. Raises SourceError for any other element type."""
    if tensor.dtype not in FLOATS:
        raise SourceError(
            f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}; expected BF16, F16 or F32."
        )
    return parse_tier(tensor.dtype)
