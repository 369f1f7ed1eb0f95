"""The memory that a repo needs, and the memory that a plan was made for."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from quantkit.artifacts.inventory import is_count
from quantkit.errors import MalformedError

_Fields = TypeVar("_Fields", "MemoryTarget", "Memory")


@dataclass(frozen=True)
class MemoryTarget:
    """The memory that a plan is made for.

    `mac_gib` is the memory of a Mac, None where the budget names no Mac. Beside the weights fit a
    KV cache for `context` tokens, and `reserve` bytes for activations and the rest of the process.
    """

    mac_gib: int | None = None
    context: int = 8192
    reserve: int = 1_500_000_000

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "MemoryTarget":
        """Read `asdict` of a target. Raises TypeError for anything else."""
        return _counted(cls(**data), "memory target")


@dataclass(frozen=True)
class Memory:
    """The computed memory of a running repo: weights, KV cache of `context` tokens, and a reserve.

    `smallest_mac_gib` is the memory of the smallest Mac whose GPU may use `needed_bytes`, None if
    no Mac has as much.
    """

    context: int
    cache_bytes: int
    reserve_bytes: int
    needed_bytes: int
    smallest_mac_gib: int | None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Memory":
        """Read `asdict` of a memory report. Raises TypeError for anything else."""
        return _counted(cls(**data), "memory")


def _counted(memory: _Fields, name: str) -> _Fields:
    """Return `memory`, all of whose fields must be counts or None. Raises MalformedError."""
    if not all(value is None or is_count(value) for value in asdict(memory).values()):
        raise MalformedError(f"{name}: not a whole number")
    return memory
