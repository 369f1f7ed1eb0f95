"""Write safetensors: headers, and small files whole.

Format: https://huggingface.co/docs/safetensors/index#format
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from quantkit.formats.tiers import TensorSpec


def header_bytes(specs: Iterable[TensorSpec], made_by: str) -> bytes:
    """Return the header of a file with `specs` back to back: length, JSON, padding to 8 bytes.

    `made_by` is the metadata's `format`: `mlx` for repos, `pt` for PyTorch's own.
    """
    entries: dict[str, object] = {"__metadata__": {"format": made_by}}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, tensors: Sequence[tuple[TensorSpec, np.ndarray]]) -> None:
    """Write numpy carriers (BF16 as uint16) as a safetensors file, each in the shape of its
    spec.
    """
    with open(path, "wb") as file:
        file.write(header_bytes((spec for spec, _ in tensors), "pt"))
        for _, values in tensors:
            file.write(np.ascontiguousarray(values).data)
