"""Tiers: the storage formats of a weight in MLX, and their exact sizes.

Sizes are arithmetic; this module does not import mlx.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

from quantkit.errors import TierError
from quantkit.formats.dtypes import nbytes
from quantkit.units import version_numbers

Mode = Literal["float", "affine", "mxfp4", "mxfp8", "nvfp4", "native"]
_ONE_BIT_MLX = "0.32.4"  # the first mlx that has affine tiers of one bit


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
    """A storage format of a weight (..., out, in).

    `group_size` consecutive values along `in` share a scale; 0 for floats.
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

    @property
    def mlx_version(self) -> str | None:
        """The first version of mlx that has the tier; None if every supported version has it."""
        return _ONE_BIT_MLX if self.bits == 1 else None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether a weight of `shape` can be stored in this tier."""
        return not self.quantized or (len(shape) > 1 and shape[-1] % self.group_size == 0)

    def require_fit(self, weight: str, shape: tuple[int, ...]) -> None:
        """Check that the tier fits `shape`. Raises TierError naming `weight`."""
        if not self.fits(shape):
            raise TierError(
                f"{weight}: tier {self.name} does not fit shape {list(shape)}: its last "
                f"dimension is not a multiple of {self.group_size}. Choose another tier for it."
            )

    def tensors(self, weight: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorSpec, ...]:
        """Return the tensors that mlx-lm expects for `weight`, in writing order.

        `dtype` is the float type (BF16, F16 or F32) of affine scales and biases. MLX packs integers
        into uint32, little end first.
        """
        if self.mode == "native":
            raise TierError(f"{weight}: tier native has no size; resolve it first.")
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
        """Return the exact bytes of a weight of `shape`, scales and biases included."""
        return sum(spec.nbytes for spec in self.tensors("weight", shape, dtype))

    def config_entry(self) -> dict[str, int | str]:
        """Return the module's entry in mlx-lm's `quantization`.

        `mode` is always written: an entry without it means affine, despite the top level.
        """
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


NATIVE = Tier("native", 0, 0, "native")
BF16 = Tier("bf16", 16, 0, "float")
F16 = Tier("f16", 16, 0, "float")
F32 = Tier("f32", 32, 0, "float")
MXFP4 = Tier("mxfp4", 4, 32, "mxfp4")
MXFP8 = Tier("mxfp8", 8, 32, "mxfp8")
NVFP4 = Tier("nvfp4", 4, 16, "nvfp4")


def _affine() -> Iterator[Tier]:
    for bits in (8, 6, 5, 4, 3, 2, 1):
        for group_size in (128, 64, 32):
            yield Tier(f"q{bits}g{group_size}", bits, group_size, "affine")


TIERS: dict[str, Tier] = {
    tier.name: tier for tier in (NATIVE, F32, BF16, F16, MXFP8, NVFP4, MXFP4, *_affine())
}


def parse_tier(name: str) -> Tier:
    """Return the tier called `name`. Raises TierError for an unknown one."""
    tier = TIERS.get(name.strip().lower())
    if tier is None:
        raise TierError(
            f"unknown tier {name!r}. Write it like q4g64 (1, 2, 3, 4, 5, 6 or 8 bits; g32, g64 "
            "or g128), or mxfp4, mxfp8, nvfp4, bf16, f16, native."
        )
    return tier


def resolve(tier: Tier, storage: Tier) -> Tier:
    """Return the physical tier: `storage` for the tier `native`, else the tier itself."""
    return storage if tier is NATIVE else tier


def canonical(tier: Tier, storage: Tier) -> Tier:
    """Return the one name of a tier for a weight stored in `storage`.

    An unchanged float weight is named by its type (`bf16`), unchanged MXFP4 is named `native`.
    """
    physical = resolve(tier, storage)
    return NATIVE if physical == storage and storage.quantized else physical


def native_name(storage: str) -> str:
    """Return the canonical name of leaving a weight in its `storage` tier."""
    tier = parse_tier(storage)
    return canonical(tier, tier).name


def is_available(tier: Tier) -> bool:
    """Return whether the installed mlx has a tier."""
    return tier.mlx_version is None or version_numbers(version("mlx")) >= version_numbers(
        tier.mlx_version
    )


def require_available(tier: Tier) -> None:
    """Check that the installed mlx has a tier. Raises TierError."""
    if not is_available(tier):
        raise TierError(
            f"tier {tier} needs mlx {tier.mlx_version}, installed is {version('mlx')}. Upgrade: "
            "pip install -U mlx"
        )


def required_mlx(names: Iterable[str]) -> str | None:
    """Return the first version of mlx that has all the tiers called `names`, None for any."""
    versions = {tier.mlx_version for tier in map(parse_tier, names)} - {None}
    return max((v for v in versions if v is not None), key=version_numbers, default=None)
