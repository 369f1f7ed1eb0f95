"""The bytes of a unit, block by block: read, decode, encode.

At most a few blocks are in memory at a time, whatever the tensor's size; scales and biases, which
follow the integers in the file, are held until those are out (one sixteenth of the weight in
affine g64).
"""

from collections import deque
from collections.abc import Iterator

import numpy as np

from quantkit.backend import mx, streams
from quantkit.errors import SourceError
from quantkit.formats import mxfp4
from quantkit.formats.codec import decode_mxfp4, encode, to_mx, to_numpy
from quantkit.formats.dtypes import nan_scales, nonfinite
from quantkit.formats.tiers import MXFP4, Tier, parse_tier
from quantkit.rewrite.shards import Unit
from quantkit.source.source import Source

_AHEAD = 4  # blocks being encoded while the oldest is written


def unit_blocks(source: Source, unit: Unit, storage: str | None) -> Iterator[np.ndarray]:
    """The bytes of `unit`, in the order of its tensors.

    `storage` names the tier the source holds the weight in; None for a kept tensor. Raises
    SourceError, naming the tensor and the count, if a weight to be encoded, or an MXFP4 scale, is
    NaN or infinite.
    """
    if unit.tier is not None and storage is not None:
        yield from _encoded(source, unit, unit.tier, parse_tier(storage))
        return
    for spec in unit.tensors:
        for start, stop in source.blocks(spec.name):
            block = source.read(spec.name, start, stop)
            if storage == MXFP4.name and spec.dtype == "U8":
                _require_finite_scales(unit.name, block)
            yield block


def _encoded(source: Source, unit: Unit, tier: Tier, storage: Tier) -> Iterator[np.ndarray]:
    pending: deque[tuple[mx.array, ...]] = deque()
    rest: list[tuple[np.ndarray, ...]] = []

    def oldest() -> np.ndarray:
        first, *others = (to_numpy(array) for array in pending.popleft())
        rest.append(tuple(others))
        return first

    lanes = streams()
    for values in _float_blocks(source, unit.name, storage):
        with mx.stream(next(lanes)):
            encoded = encode(values, tier)
        mx.async_eval(*encoded)  # type: ignore[no-untyped-call]
        pending.append(encoded)
        if len(pending) == _AHEAD:
            yield oldest()
    while pending:
        yield oldest()
    for column in zip(*rest, strict=True):
        yield from column
    mx.clear_cache()


def _float_blocks(source: Source, name: str, storage: Tier) -> Iterator[mx.array]:
    """The weight's values, a range of rows at a time, all finite."""
    weight = f"{name}.weight"
    dtype = source.dtype(weight)
    for start, stop in source.blocks(weight):
        carrier = source.read(weight, start, stop)
        if storage == MXFP4:
            scales = source.read(f"{name}.scales", start, stop)
            bad = mxfp4.nonfinite(carrier, scales)
            values = None if bad else decode_mxfp4(carrier, scales)
        else:
            bad = nonfinite(carrier, dtype)
            values = None if bad else to_mx(carrier, dtype)
        if values is None:
            raise _nonfinite_error(source, name, storage)
        yield values


def _nonfinite_error(source: Source, name: str, storage: Tier) -> SourceError:
    weight = f"{name}.weight"
    bad = total = 0
    for start, stop in source.blocks(weight):
        carrier = source.read(weight, start, stop)
        if storage == MXFP4:
            bad += mxfp4.nonfinite(carrier, source.read(f"{name}.scales", start, stop))
            total += 8 * carrier.size
        else:
            bad += nonfinite(carrier, source.dtype(weight))
            total += carrier.size
    return SourceError(
        f"{name}: {bad} of {total} values are NaN or infinite and cannot be quantized. "
        "The checkpoint is damaged: download it again."
    )


def _require_finite_scales(name: str, scales: np.ndarray) -> None:
    if bad := nan_scales(scales, MXFP4.mode):
        raise SourceError(
            f"{name}: {bad} MXFP4 scales are NaN. The checkpoint is damaged: download it again."
        )
