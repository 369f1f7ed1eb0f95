"""Tiers: the ways MLX can store a weight, and exactly how many bytes each one takes.

Sizes are arithmetic; nothing here imports mlx.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from quantkit.errors import TierError
from quantkit.formats.dtypes import nbytes

Mode = Literal["float", "affine", "mxfp4", "mxfp8", "nvfp4", "native"]


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor: its name, safetensors element type and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Tier:
    """A way to store a weight of shape (..., out, in).

    `group_size` consecutive values along `in` share a scale; 0 where nothing is shared.
    """

    name: str
    bits: int
    group_size: int
    mode: Mode

    def __str__(self) -> str:
        return self.name

    @property
    def quantized(self) -> bool:
        return self.mode not in ("float", "native")

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of `shape` can be stored this way."""
        return not self.quantized or (len(shape) > 1 and shape[-1] % self.group_size == 0)

    def require_fit(self, weight: str, shape: tuple[int, ...]) -> None:
        """Raises TierError, naming `weight`, unless the tier fits `shape`."""
        if not self.fits(shape):
            raise TierError(
                f"{weight}: tier {self.name} does not fit shape {list(shape)}: its last "
                f"dimension is no multiple of {self.group_size}. Choose another tier for it."
            )

    def tensors(self, weight: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorSpec, ...]:
        """What mlx-lm expects to find stored for `weight`, in writing order.

        `dtype` is the float type of the weight (BF16, F16 or F32), which affine scales and
        biases keep. MLX packs integers into uint32, little end first.
        """
        if self.mode == "native":
            raise TierError(f"{weight}: tier native has no size of its own; resolve it first.")
        if self.mode == "float":
            return (TensorSpec(f"{weight}.weight", self.name.upper(), shape),)
        self.require_fit(weight, shape)
        packed = (*shape[:-1], shape[-1] * self.bits // 32)
        groups = (*shape[:-1], shape[-1] // self.group_size)
        specs = [TensorSpec(f"{weight}.weight", "U32", packed)]
        specs.append(
            TensorSpec(f"{weight}.scales", dtype if self.mode == "affine" else "U8", groups)
        )
        if self.mode == "affine":
            specs.append(TensorSpec(f"{weight}.biases", dtype, groups))
        return tuple(specs)

    def stored_bytes(self, shape: tuple[int, ...], dtype: str = "BF16") -> int:
        """Exact bytes of a weight of `shape`, scales and biases included."""
        return sum(spec.nbytes for spec in self.tensors("weight", shape, dtype))

    def config_entry(self) -> dict[str, int | str]:
        """The module's entry in mlx-lm's `quantization`. `mode` is always spelled out: an entry
        without it means affine, whatever the top level says."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


QUANTIZERS = ("rtn", "search", "gptq")  # ways to choose a weight's numbers inside of a tier

NATIVE = Tier("native", 0, 0, "native")
BF16 = Tier("bf16", 16, 0, "float")
F16 = Tier("f16", 16, 0, "float")
F32 = Tier("f32", 32, 0, "float")
MXFP4 = Tier("mxfp4", 4, 32, "mxfp4")
MXFP8 = Tier("mxfp8", 8, 32, "mxfp8")
NVFP4 = Tier("nvfp4", 4, 16, "nvfp4")


def _affine() -> Iterator[Tier]:
    for bits in (8, 6, 5, 4, 3, 2):
        for group_size in (128, 64, 32):
            yield Tier(f"q{bits}g{group_size}", bits, group_size, "affine")


TIERS: dict[str, Tier] = {
    tier.name: tier for tier in (NATIVE, F32, BF16, F16, MXFP8, NVFP4, MXFP4, *_affine())
}


def parse_tier(name: str) -> Tier:
    """The tier called `name`. Raises TierError for any other name."""
    tier = TIERS.get(name.strip().lower())
    if tier is None:
        known = ", ".join(name for name in TIERS if name != "f32")
        raise TierError(f"there is no tier {name!r}. Tiers: {known}.")
    return tier


def resolve(tier: Tier, storage: Tier) -> Tier:
    """The physical tier behind a choice: what `native` means for a weight held in `storage`."""
    return storage if tier is NATIVE else tier


def canonical(tier: Tier, storage: Tier) -> Tier:
    """The one name a choice goes by: `native` if and only if packed values are kept as they are.

    Keeping floats is called by their type (`bf16`), keeping MXFP4 is called `native`, whichever
    of the two names was asked for.
    """
    physical = resolve(tier, storage)
    return NATIVE if physical == storage and storage.quantized else physical


def kept_name(storage: str) -> str:
    """What keeping a weight as it is held in `storage` is called."""
    held = parse_tier(storage)
    return canonical(held, held).name
