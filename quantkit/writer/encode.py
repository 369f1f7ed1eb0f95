"""The bytes of a unit, block by block: read, decode, encode.

Only a few blocks are in memory at a time. Scales and biases follow the integers in the file, so
they wait in memory until the integers are written (at g64, a 32nd of the weight in BF16).
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from quantkit.backend import mx, streams
from quantkit.checkpoint.source import Source
from quantkit.errors import DamagedError, TierError
from quantkit.formats import mxfp4
from quantkit.formats.codec import FLOAT_TYPES, decode_mxfp4, encode, to_mx, to_numpy
from quantkit.formats.dtypes import FLOATS, nan_scales, nonfinite
from quantkit.formats.tiers import MXFP4, Tier, parse_tier
from quantkit.storage.work_dir import Tensors
from quantkit.writer.shards import Unit

_AHEAD = 4  # blocks being encoded while the oldest is written


def unit_blocks(
    source: Source, unit: Unit, storage: str | None, quantized: Tensors | None = None
) -> Iterator[np.ndarray]:
    """Yield the bytes of `unit` as flat arrays (n,), in the order of its tensors.

    `storage` is the tier in which the source stores the weight, None for an unquantized tensor.
    `quantized` are the tensors from a quantizer; without them the weight is rounded to nearest.
    Raises DamagedError, naming the tensor and the count, if a value or an MXFP4 scale is NaN or
    infinite.
    """
    if unit.tier is not None and quantized is not None:
        for spec, values in zip(unit.tensors, quantized, strict=True):
            _require_in_range(unit.name, unit.tier, spec.dtype, values)
            yield values.reshape(-1)
        return
    if unit.tier is not None and storage is not None:
        yield from _encoded(source, unit, unit.tier, parse_tier(storage))
        return
    for spec in unit.tensors:
        for start, stop in source.blocks(spec.name):
            block = source.read(spec.name, start, stop)
            if storage == MXFP4.name and spec.dtype == "U8":
                _require_finite_scales(unit.name, block)
            elif spec.dtype in FLOATS and (bad := nonfinite(block, spec.dtype)):
                raise DamagedError(
                    f"{spec.name}: {bad} values are NaN or infinite as {spec.dtype}. The "
                    "checkpoint is damaged, or its values are too large for this type (`dtype`)."
                )
            yield block


def _encoded(source: Source, unit: Unit, tier: Tier, storage: Tier) -> Iterator[np.ndarray]:
    pending: deque[tuple[mx.array, ...]] = deque()
    scales: list[tuple[np.ndarray, ...]] = []

    def oldest() -> np.ndarray:
        first, *others = (to_numpy(array) for array in pending.popleft())
        for spec, values in zip(unit.tensors, (first, *others), strict=True):
            _require_in_range(unit.name, tier, spec.dtype, values)
        scales.append(tuple(others))
        return first

    lanes = streams()
    for start, stop in source.blocks(f"{unit.name}.weight"):
        packed = _read(source, unit.name, storage, start, stop)
        if _nonfinite(packed):
            raise _nonfinite_error(source, unit.name, storage)
        with mx.stream(next(lanes)):
            values = _decode(packed).astype(FLOAT_TYPES[source.weights[unit.name].dtype])
            encoded = encode(values, tier)
        mx.async_eval(*encoded)  # type: ignore[no-untyped-call]
        pending.append(encoded)
        if len(pending) == _AHEAD:
            yield oldest()
    while pending:
        yield oldest()
    for column in zip(*scales, strict=True):
        yield from column
    mx.clear_cache()


@dataclass(frozen=True)
class _Rows:
    """Rows of a weight as stored: MXFP4 with their `scales`, or floats of type `dtype`."""

    values: np.ndarray
    scales: np.ndarray | None
    dtype: str


def _read(source: Source, name: str, storage: Tier, start: int, stop: int) -> _Rows:
    weight = f"{name}.weight"
    scales = source.read(f"{name}.scales", start, stop) if storage == MXFP4 else None
    return _Rows(source.read(weight, start, stop), scales, source.dtype(weight))


def _decode(rows: _Rows) -> mx.array:
    if rows.scales is not None:
        return decode_mxfp4(rows.values, rows.scales)
    return to_mx(rows.values, rows.dtype)


def _nonfinite(rows: _Rows) -> int:
    if rows.scales is not None:
        return mxfp4.nonfinite(rows.values, rows.scales)
    return nonfinite(rows.values, rows.dtype)


def _nonfinite_error(source: Source, name: str, storage: Tier) -> DamagedError:
    bad = total = 0
    for start, stop in source.blocks(f"{name}.weight"):
        rows = _read(source, name, storage, start, stop)
        bad += _nonfinite(rows)
        total += rows.values.size * (1 if rows.scales is None else 8)
    return DamagedError(
        f"{name}: {bad} of {total} values are NaN or infinite and cannot be quantized. "
        "The checkpoint is damaged: download it again."
    )


def _require_in_range(name: str, tier: Tier, dtype: str, values: np.ndarray) -> None:
    """Check for finite values that became infinite, such as in F16. Raises TierError."""
    if dtype in FLOATS and (bad := nonfinite(values, dtype)):
        raise TierError(f"{name}: {bad} values are too large for tier {tier} ({dtype}).")


def _require_finite_scales(name: str, scales: np.ndarray) -> None:
    if bad := nan_scales(scales, MXFP4.mode):
        raise DamagedError(
            f"{name}: {bad} MXFP4 scales are NaN. The checkpoint is damaged: download it again."
        )
