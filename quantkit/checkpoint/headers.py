"""safetensors headers, read with distrust, as a table of tensors.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes
(https://huggingface.co/docs/safetensors/index#format).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import SourceError
from quantkit.formats.dtypes import nbytes

_MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
_AGAIN = "Download the file again."


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor: bytes [start, stop) of `file`, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the tensors of a safetensors file from its header.

    Raises SourceError if the file is missing or truncated, or if its header is not a faithful map
    of its bytes (unknown types, sizes that do not match shapes, gaps, overlaps, duplicates).
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise SourceError(f"{path.name}: not a plain file.")
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or 8 + length > size or length > _MAX_HEADER:
                raise SourceError(
                    f"{path.name}: header of {length} bytes in a file of {size}: the file is "
                    f"truncated or not a safetensors file. {_AGAIN}"
                )
            raw = file.read(length)
    except FileNotFoundError as exc:
        raise SourceError(
            f"{path.name}: missing from {path.parent}, though the index names it. {_AGAIN}"
        ) from exc
    except OSError as exc:
        raise SourceError(f"{path.name}: cannot be read ({exc.strerror}).") from exc
    return check_header(_parse(path.name, raw), path.name, 8 + length, size)


def check_header(
    entries: Mapping[str, Any], file: str, data_start: int, file_size: int
) -> dict[str, StoredTensor]:
    """Return the tensors of header `entries`, checked against the size of their file.

    `data_start` is the position of the first tensor's bytes. Raises SourceError.
    """
    tensors = {name: _tensor(name, entry, file, data_start) for name, entry in entries.items()}
    _check_offsets(tensors.values(), file, data_start, file_size)
    return tensors


def _parse(file: str, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for name, value in pairs:
            if name in names:
                raise SourceError(f"{file}: tensor {name!r} appears twice in the header. {_AGAIN}")
            names[name] = value
        return names

    try:
        entries = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as exc:
        raise SourceError(f"{file}: the header is not valid JSON ({exc}). {_AGAIN}") from exc
    if not isinstance(entries, dict):
        raise SourceError(f"{file}: the header is not a JSON object. {_AGAIN}")
    entries.pop("__metadata__", None)
    return entries


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor(name: str, entry: Any, file: str, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as exc:
        raise SourceError(
            f"{file}: tensor {name!r} has no complete header entry. {_AGAIN}"
        ) from exc
    sizes = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or not all(_is_size(value) for value in sizes):
        raise SourceError(f"{file}: tensor {name!r} has an invalid header entry. {_AGAIN}")
    try:
        expected = nbytes(dtype, tuple(shape))
    except SourceError as exc:
        raise SourceError(f"{file}: tensor {name!r}: {exc}") from exc
    if stop - start != expected:
        raise SourceError(
            f"{file}: tensor {name!r} is {dtype} {shape} and needs {expected} bytes, "
            f"but its data offsets [{start}, {stop}] hold {stop - start}. {_AGAIN}"
        )
    return StoredTensor(name, dtype, tuple(shape), file, data_start + start, data_start + stop)


def _check_offsets(
    tensors: Iterable[StoredTensor], file: str, data_start: int, file_size: int
) -> None:
    previous, end = "the header", data_start
    for tensor in sorted(tensors, key=lambda t: (t.start, t.stop)):
        if tensor.start < end:
            raise SourceError(
                f"{file}: tensor {tensor.name!r} overlaps {previous} "
                f"(starts at byte {tensor.start}, expected {end}). {_AGAIN}"
            )
        if tensor.start > end:
            raise SourceError(
                f"{file}: {tensor.start - end} bytes between {previous} and tensor "
                f"{tensor.name!r} belong to no tensor. {_AGAIN}"
            )
        previous, end = f"tensor {tensor.name!r}", tensor.stop
    if end > file_size:
        raise SourceError(
            f"{file}: truncated: {previous} ends at byte {end}, the file has {file_size}. {_AGAIN}"
        )
    if end < file_size:
        raise SourceError(
            f"{file}: {file_size - end} bytes after {previous} belong to no tensor. {_AGAIN}"
        )
