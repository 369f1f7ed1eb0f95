"""The inventory of a checkpoint, and its identity. Tiers appear by name only."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from quantkit.artifacts.roles import EXPERT_ROLES
from quantkit.errors import MalformedError
from quantkit.units import bits_per_weight


@dataclass(frozen=True)
class SourceFile:
    """One file of a source; `sha256` is None until it is computed or published by the Hub."""

    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class SourceId:
    """The identity of a checkpoint.

    `structure` hashes config and headers (names, types, shapes): the Hub's metadata and a
    downloaded copy agree on it. The hashes of the files identify the values.
    """

    name: str
    revision: str | None
    structure: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Weight:
    """A quantizable matrix, or a stack of experts, under its mlx-lm module path.

    `shape` is (..., out, in). `storage` is the tier in which the source stores it, `bytes` its size
    in that tier. `dtype` is the float type (BF16, F16 or F32) of affine scales and biases.
    """

    name: str
    role: str
    layer: int | None
    layer_kind: str | None
    shape: tuple[int, ...]
    storage: str
    bytes: int
    dtype: str = "BF16"

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class UnquantizedTensor:
    """A norm, bias or sink, which is never quantized."""

    name: str
    role: str
    layer: int | None
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inventory:
    """All tensors of a checkpoint, under mlx-lm's names and in the order of the model.

    `experts` and `experts_per_token` are None for a dense model.
    """

    source: SourceId
    model_type: str
    layers: int
    experts: int | None
    experts_per_token: int | None
    weights: tuple[Weight, ...]
    unquantized: tuple[UnquantizedTensor, ...]

    @property
    def parameters(self) -> int:
        return sum(w.parameters for w in self.weights) + sum(t.parameters for t in self.unquantized)

    @property
    def total_bytes(self) -> int:
        return sum(w.bytes for w in self.weights) + sum(t.bytes for t in self.unquantized)

    @property
    def tied(self) -> bool:
        """Whether the embedding is also the output head."""
        return not any(weight.role == "lm_head" for weight in self.weights)

    def active_share(self, role: str, rows: int) -> tuple[int, int] | None:
        """Return the fraction of a tensor of `rows` rows that one generated token reads.

        A token reads one row of an untied embedding, the experts that the router picks, and every
        other tensor whole. None if the config does not say how many experts a token uses.
        """
        if role in EXPERT_ROLES:
            if self.experts is None or self.experts_per_token is None:
                return None
            return self.experts_per_token, self.experts
        if role == "embedding" and not self.tied:
            return 1, rows
        return 1, 1

    def to_json(self) -> dict[str, Any]:
        """Return the inventory as a JSON object."""
        weights = [
            {**asdict(weight), "tier": weight.storage, "parameters": weight.parameters}
            for weight in self.weights
        ]
        return {
            "source": asdict(self.source),
            "model_type": self.model_type,
            "layers": self.layers,
            "experts": self.experts,
            "experts_per_token": self.experts_per_token,
            "parameters": self.parameters,
            "total_bytes": self.total_bytes,
            "bits_per_weight": bits_per_weight(self.total_bytes, self.parameters),
            "weights": weights,
            "unquantized": [asdict(tensor) for tensor in self.unquantized],
        }


def with_hashes(source: SourceId, hashes: Mapping[str, str]) -> SourceId:
    """Return `source` with the sha256 of its files filled in."""
    files = tuple(replace(file, sha256=hashes.get(file.name, file.sha256)) for file in source.files)
    return replace(source, files=files)


def source_file(data: Mapping[str, Any]) -> SourceFile:
    """Read `asdict` of a source file. Raises TypeError for anything else."""
    file = SourceFile(**data)
    hashed = file.sha256 is None or isinstance(file.sha256, str)
    path = PurePosixPath(file.name)
    plain = str(path) == file.name and not path.is_absolute() and ".." not in path.parts
    if not hashed or not is_count(file.size) or not plain or not path.name:
        raise MalformedError(f"file {file.name!r}: malformed name, size or hash")
    return file


def source_id(data: Mapping[str, Any]) -> SourceId:
    """Read `asdict` of a source's identity. Raises KeyError or TypeError for anything else."""
    files = tuple(source_file(file) for file in data["files"])
    return SourceId(data["name"], data["revision"], data["structure"], files)


def is_count(value: Any) -> bool:
    """Return whether a value read from JSON is a count: a whole number from 0 to 2^63 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
