"""The element types of safetensors files that quantkit reads and writes."""

import math
from typing import Any

import numpy as np

from quantkit.errors import SourceError

# BF16 has no numpy type: its bits travel as uint16.
_NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("u1"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
FLOATS = ("BF16", "F16", "F32")


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy type that carries `dtype`, uint16 for BF16. Raises SourceError if
    unknown.
    """
    if dtype not in _NUMPY:
        raise SourceError(f"element type {dtype} is not one quantkit reads ({', '.join(_NUMPY)}).")
    return _NUMPY[dtype]


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the stored bytes of a tensor."""
    return numpy_dtype(dtype).itemsize * math.prod(shape)


def nan_scales(scales: np.ndarray, mode: str) -> int:
    """Count the NaN among one-byte scales of any shape: E4M3 in nvfp4 (127, 255), else E8M0
    (255).
    """
    return int(np.count_nonzero((scales | 0x80 if mode == "nvfp4" else scales) == 0xFF))


def nonfinite(values: np.ndarray, dtype: str) -> int:
    """Count the NaN and infinite values among carriers, of any shape, of a float `dtype`."""
    if dtype == "BF16":
        return int(np.count_nonzero((values & 0x7F80) == 0x7F80))
    return int(values.size - np.count_nonzero(np.isfinite(values)))
