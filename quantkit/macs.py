"""What a Mac's memory holds: weights, the KV cache, and a reserve for all else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.artifacts.report import Memory
from quantkit.checkpoint.tensor_map import optional_int, text_scope
from quantkit.errors import InputError

SIZES = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
"""GiB of memory that Macs with Apple silicon are sold with."""

_CACHE_BYTES = 2  # of a key or a value: mlx-lm's cache is 16 bits


@dataclass(frozen=True)
class MemoryTarget:
    """What memory must hold beside the weights: a KV cache for `context` tokens, and `reserve`
    bytes for activations and all else."""

    context: int = 8192
    reserve: int = 1_500_000_000


def wired_by_default(memory: int) -> int:
    """Bytes that macOS lets the GPU wire, of so many bytes of memory: two thirds of small memories,
    three quarters of others."""
    return memory * 2 // 3 if memory <= 36 << 30 else memory * 3 // 4


def cache_bytes(config: Mapping[str, Any], context: int) -> int:
    """Bytes of the KV cache for `context` tokens, 16 bits a value.

    Layers with a sliding window keep no more than the window. Raises InputError for a config that
    does not say how large keys and values are.
    """
    scope = text_scope(config)
    layers = optional_int(scope, "num_hidden_layers", "n_layers", "n_layer")
    heads = optional_int(scope, "num_attention_heads", "n_head", "n_heads")
    keys = optional_int(scope, "num_key_value_heads") or heads
    hidden = optional_int(scope, "hidden_size", "n_embd", "d_model")
    width = optional_int(scope, "head_dim") or (hidden // heads if hidden and heads else None)
    if layers is None or keys is None or width is None:
        raise InputError("config.json does not say how large the KV cache is; give bytes instead.")
    kinds = scope.get("layer_types")
    kinds = kinds if isinstance(kinds, list) else []
    window = optional_int(scope, "sliding_window")
    sliding = sum(kind == "sliding_attention" for kind in kinds) if window else 0
    tokens = (layers - sliding) * context + sliding * min(context, window or 0)
    return 2 * keys * width * _CACHE_BYTES * tokens


def memory_needed(
    stored: int, config: Mapping[str, Any], room: MemoryTarget | None = None
) -> Memory | None:
    """What running `stored` bytes of weights takes, and the smallest Mac that has it; None where
    the config does not say how large the KV cache is."""
    room = room or MemoryTarget()
    try:
        cache = cache_bytes(config, room.context)
    except InputError:
        return None
    needed = stored + cache + room.reserve
    smallest = next((gib for gib in SIZES if wired_by_default(gib << 30) >= needed), None)
    return Memory(room.context, cache, room.reserve, needed, smallest)
