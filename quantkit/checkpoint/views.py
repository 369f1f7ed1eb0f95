"""Views: a tensor of the mlx-lm model, as rows of stored tensors.

A row is the unit in which a view can be cut. A view reads any range of its rows alone, so that a 1
GB tensor passes through a few MB of memory. Arrays are numpy carriers: BF16 travels as uint16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.headers import StoredTensor
from quantkit.formats.dtypes import numpy_dtype


class View(Protocol):
    """The rows of one tensor: `rows` rows of `width` elements.

    Reads should start and stop at multiples of `step`.
    """

    @property
    def dtype(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def step(self) -> int: ...

    def read(self, checkpoint: Checkpoint, start: int, stop: int, /) -> np.ndarray:
        """Read rows [start, stop) as an array (stop - start, width)."""
        ...


@dataclass(frozen=True)
class RowView:
    """Every `stride`-th row of a stored tensor, from `offset` on, viewed as `dtype`."""

    tensor: StoredTensor
    dtype: str
    rows: int
    width: int
    stride: int = 1
    offset: int = 0
    step: int = 1

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray:
        """Read rows [start, stop) as an array (stop - start, width)."""
        wanted = numpy_dtype(self.dtype)
        stored = self.width * wanted.itemsize // numpy_dtype(self.tensor.dtype).itemsize
        span = slice(start * self.stride * stored, stop * self.stride * stored)
        values = checkpoint.read(self.tensor, span.start, span.stop)
        rows = values.reshape(stop - start, self.stride, stored)[:, self.offset]
        return np.ascontiguousarray(rows).view(wanted)


@dataclass(frozen=True)
class TransposedView:
    """Columns offset::stride of a stored stack [E, in, stride * out], as rows of [E, out, in]."""

    tensor: StoredTensor
    stride: int = 1
    offset: int = 0

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def width(self) -> int:
        return self.tensor.shape[1]

    @property
    def step(self) -> int:
        """The rows of one expert, which is read whole."""
        return self.tensor.shape[2] // self.stride

    @property
    def rows(self) -> int:
        return self.tensor.shape[0] * self.step

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray:
        """Read rows [start, stop) as an array (stop - start, width)."""
        if start % self.step or (stop % self.step and stop != self.rows):
            raise ValueError(f"rows {start}:{stop} do not cut at whole experts ({self.step})")
        _, n_in, n_out = self.tensor.shape
        first, last = start // self.step, stop // self.step
        values = checkpoint.read(self.tensor, first * n_in * n_out, last * n_in * n_out)
        experts = values.reshape(last - first, n_in, n_out)[:, :, self.offset :: self.stride]
        return np.ascontiguousarray(experts.transpose(0, 2, 1)).reshape(-1, n_in)


@dataclass(frozen=True)
class ComputedView:
    """A tensor that a model class's `sanitize` computes from stored ones.

    `compute` returns the whole tensor as a numpy carrier, and caches the last one, since
    consecutive reads are for the same tensor.
    """

    name: str
    dtype: str
    rows: int
    width: int
    compute: Callable[[str], np.ndarray]
    step: int = 1

    def read(self, _checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray:
        """Read rows [start, stop) as an array (stop - start, width)."""
        return self.compute(self.name).reshape(self.rows, self.width)[start:stop]


@dataclass(frozen=True)
class CastView:
    """A float tensor in another float type, rounded to nearest as mlx does."""

    stored: View
    dtype: str

    @property
    def rows(self) -> int:
        return self.stored.rows

    @property
    def width(self) -> int:
        return self.stored.width

    @property
    def step(self) -> int:
        return self.stored.step

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray:
        """Read rows [start, stop) as an array (stop - start, width)."""
        from quantkit.formats.codec import FLOAT_TYPES, to_mx, to_numpy  # mlx, for values only

        values = to_mx(self.stored.read(checkpoint, start, stop), self.stored.dtype)
        return to_numpy(values.astype(FLOAT_TYPES[self.dtype]))


def plain_view(tensor: StoredTensor) -> RowView:
    """Return a view of a stored tensor as it is."""
    width = tensor.shape[-1] if tensor.shape else 1
    rows = 1
    for size in tensor.shape[:-1]:
        rows *= size
    return RowView(tensor, tensor.dtype, rows, width)
