"""The memory that a repo leaves for KV caches, on a GPU that may not hold more."""

from pathlib import Path

from quantkit.artifacts.memory import MemoryTarget
from quantkit.backend import mx, wired_bytes
from quantkit.checkpoint.model_config import ModelConfig
from quantkit.errors import InputError
from quantkit.storage.json_files import load_json

_LEAST = 256 << 20  # bytes
_UNKNOWN = 16 << 30  # bytes of memory, where the device does not tell


def sequences_that_fit(folder: Path | None, tokens: int, most: int) -> int:
    """Return how many KV caches of `tokens` fit beside the weights of a repo, from 1 to `most`.

    The most, if there is no Metal or the size of the caches is unknown.
    """
    try:
        return most if folder is None else max(1, min(most, _left(folder) // _kv(folder, tokens)))
    except InputError:
        return most


def prompt_cache_bytes(folder: Path | None) -> int:
    """Return the bytes for caches of prompts that may come again: an eighth of the memory.

    They are fewer where the weights of a repo and the cache of a prompt, as long as budgets plan
    for, leave less.
    """
    share = int(mx.device_info().get("memory_size", _UNKNOWN)) // 8
    try:
        left = share if folder is None else _left(folder) - _kv(folder, MemoryTarget().context)
    except InputError:
        return share
    return max(_LEAST, min(share, left))


def _left(folder: Path) -> int:
    """Return what weights and the reserve of budgets leave. Raises InputError without Metal."""
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return wired_bytes() - weights - MemoryTarget().reserve


def _kv(folder: Path, tokens: int) -> int:
    config = ModelConfig.parse(load_json(folder / "config.json", InputError))
    return max(1, config.kv_cache_bytes(tokens))
