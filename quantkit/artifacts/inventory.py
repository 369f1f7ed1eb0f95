"""What a checkpoint holds, and which checkpoint it is.

Tiers appear by name, so that nothing here needs to know what a tier is.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from quantkit.artifacts.roles import EXPERT_ROLES
from quantkit.units import bits_per_weight


@dataclass(frozen=True)
class SourceFile:
    """One shard of a source; `sha256` is None until it is known (the Hub publishes it)."""

    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class SourceId:
    """Which checkpoint something was made from.

    `structure` hashes config and headers (names, types, shapes), so that the Hub's metadata and a
    downloaded copy agree; the files' own hashes identify the values.
    """

    name: str
    revision: str | None
    structure: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Weight:
    """A quantizable matrix, or a stack of experts, under its mlx-lm module path.

    `shape` is (..., out, in). `storage` names the tier in which the source holds it, `bytes` what
    it takes there. `dtype` is the float type (BF16, F16 or F32) of its affine scales and biases.
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
    """A tensor that no tier applies to (norm, bias, sink): stored as it is."""

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
    """Everything a checkpoint holds, in mlx-lm's names and in the order of the model.

    `experts` and `experts_per_token` are None for a model without experts.
    """

    source: SourceId
    model_type: str
    layers: int
    experts: int | None
    experts_per_token: int | None
    weights: tuple[Weight, ...]
    kept: tuple[UnquantizedTensor, ...]

    @property
    def parameters(self) -> int:
        return sum(w.parameters for w in self.weights) + sum(t.parameters for t in self.kept)

    @property
    def total_bytes(self) -> int:
        return sum(w.bytes for w in self.weights) + sum(t.bytes for t in self.kept)

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output head too."""
        return not any(weight.role == "lm_head" for weight in self.weights)

    def active_share(self, role: str, rows: int) -> tuple[int, int] | None:
        """The fraction of a tensor of `rows` rows that one generated token reads.

        An untied embedding gives one row, experts those the router picks, all else is read whole.
        None where the config does not say how many experts a token uses.
        """
        if role in EXPERT_ROLES:
            if self.experts is None or self.experts_per_token is None:
                return None
            return self.experts_per_token, self.experts
        if role == "embedding" and not self.tied:
            return 1, rows
        return 1, 1

    def to_json(self) -> dict[str, Any]:
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
            "kept": [asdict(tensor) for tensor in self.kept],
        }


def with_hashes(source: SourceId, hashes: Mapping[str, str]) -> SourceId:
    """`source` with the sha256 of its files filled in."""
    files = tuple(replace(file, sha256=hashes.get(file.name, file.sha256)) for file in source.files)
    return replace(source, files=files)


def source_file(data: Mapping[str, Any]) -> SourceFile:
    """A file of a source read back. Raises TypeError for what cannot be one."""
    file = SourceFile(**data)
    known = file.sha256 is None or isinstance(file.sha256, str)
    path = PurePosixPath(file.name)
    plain = str(path) == file.name and not path.is_absolute() and ".." not in path.parts
    if not known or not is_count(file.size) or not plain or not path.name:
        raise TypeError(f"file {file.name!r} is not described rightly")
    return file


def source_id(data: Mapping[str, Any]) -> SourceId:
    """Which source it was, read back. Raises KeyError or TypeError for what cannot be one."""
    files = tuple(source_file(file) for file in data["files"])
    return SourceId(data["name"], data["revision"], data["structure"], files)


def is_count(value: Any) -> bool:
    """Whether a value read from JSON can be a number of bytes or of things."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
