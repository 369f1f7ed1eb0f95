"""The memory of Macs: the share that the GPU may use, and the smallest Mac for a repo."""

from quantkit.artifacts.memory import Memory, MemoryTarget
from quantkit.checkpoint.model_config import ModelConfig
from quantkit.errors import InputError

SIZES = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
"""GiB of memory in Macs with Apple silicon."""


def wired_by_default(memory: int) -> int:
    """Return the bytes that macOS lets the GPU wire by default, of `memory` bytes.

    Two thirds up to 36 GiB, three quarters above.
    """
    return memory * 2 // 3 if memory <= 36 << 30 else memory * 3 // 4


def memory_needed(stored: int, config: ModelConfig, target: MemoryTarget) -> Memory | None:
    """Return the memory for `stored` bytes of weights with the context and reserve of `target`.

    None if the config does not determine the size of the KV cache.
    """
    try:
        cache = config.kv_cache_bytes(target.context)
    except InputError:
        return None
    needed = stored + cache + target.reserve
    smallest = next((gib for gib in SIZES if wired_by_default(gib << 30) >= needed), None)
    return Memory(target.context, cache, target.reserve, needed, smallest)
