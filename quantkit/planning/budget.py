"""Budgets as people write them, in bytes.

4.25bpw        bits per weight, counting every stored byte
12GB, 48GiB    bytes
mac:64GB       the share of a Mac's memory for weights; mac:this asks the machine
like:RECIPE    the bytes of a recipe's plan; like:FOLDER the bytes of a repo
lossless       the smallest plan with a predicted KL of 0
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.memory import MemoryTarget
from quantkit.checkpoint.checkpoint import open_folder
from quantkit.checkpoint.model_config import ModelConfig
from quantkit.errors import InputError
from quantkit.planning.mac_memory import wired_by_default
from quantkit.planning.recipe import load_recipe, plan_by_recipe, recipe_names
from quantkit.storage.paths import user_path
from quantkit.units import gb, parse_bytes

_NUMBER = re.compile(r"\s*[0-9]+(?:\.[0-9]*)?\s*", re.ASCII)
_BPW = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*bpw\s*", re.IGNORECASE)
_SPEED = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*tok/s\s*@\s*([^/]+)/s\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """The bytes that a plan may take.

    `bytes` limits the stored bytes, None for `lossless`; `active_bytes` the bytes read per
    generated token. `label` is the budget in the words of its author. `memory_target` holds
    context and reserve, and the Mac of a `mac:` budget.
    """

    bytes: int | None
    label: str = ""
    active_bytes: int | None = None
    memory_target: MemoryTarget | None = None

    @property
    def limits(self) -> tuple[str, ...]:
        """The limits as text."""
        stored = self.label
        if self.bytes is not None:
            stored = f"{self.label or 'budget'}: {self.bytes:,} bytes"
        read = f"{self.active_bytes or 0:,} bytes read per token"
        return (stored,) if self.active_bytes is None else (stored, read)


def parse_budget(
    text: str,
    inventory: Inventory,
    config: ModelConfig,
    target: MemoryTarget | None = None,
    active_bytes: int | None = None,
) -> Budget:
    """Parse a budget for the checkpoint with this `inventory` and `config`.

    `target` holds context and reserve for `mac:`. Raises InputError.
    """
    budget = _parse(text, inventory, config, target)
    target = budget.memory_target or target
    return replace(budget, active_bytes=active_bytes, memory_target=target)


def _parse(
    text: str, inventory: Inventory, config: ModelConfig, target: MemoryTarget | None
) -> Budget:
    if text.strip().lower() == "lossless":
        return Budget(None, "lossless")
    if match := _BPW.fullmatch(text):
        return Budget(int(Fraction(match[1]) * inventory.parameters / 8), text.strip())
    kind, colon, value = text.partition(":")
    if colon and kind.lower() == "mac":
        return _mac(value, config, target or MemoryTarget())
    if colon and kind.lower() == "like":
        return Budget(_bytes_like(value, inventory), text)
    if colon:
        raise InputError(f"`budget` {text!r}: use mac:64GB, mac:this, like:RECIPE or like:FOLDER.")
    if _NUMBER.fullmatch(text):
        number = text.strip()
        raise InputError(
            f"`budget` {text!r} has no unit. Write {number}bpw for bits per weight, or {number}GB."
        )
    try:
        return Budget(parse_bytes(text), text.strip())
    except InputError as exc:
        raise InputError(
            f"`budget` {text!r} is not understood. Write it like 4.25bpw, 12GB, 48GiB, mac:64GB, "
            "like:mxfp4-q8 or lossless."
        ) from exc


def parse_speed(text: str) -> tuple[int, int]:
    """Parse `60tok/s@400GB/s` to (bytes to read per token, bytes per second). Raises InputError."""
    match = _SPEED.fullmatch(text)
    bandwidth = parse_bytes(match[2]) if match else 0
    if match is None or not bandwidth or not Fraction(match[1]):
        raise InputError(
            f"`speed` {text!r}: write tokens per second at a memory bandwidth, like "
            "60tok/s@400GB/s."
        )
    return int(bandwidth / Fraction(match[1])), bandwidth


def _mac(text: str, config: ModelConfig, target: MemoryTarget) -> Budget:
    if text.strip().lower() == "this":
        from quantkit.backend import wired_bytes  # mlx, only if the machine is asked

        wired, mac, mac_gib = wired_bytes(), "mac:this", None
    else:
        memory = _memory(text)
        wired, mac, mac_gib = wired_by_default(memory), f"mac:{text.strip()}", memory >> 30
    cache = config.kv_cache_bytes(target.context)
    left = wired - cache - target.reserve
    label = (
        f"{mac} ({gb(wired)} for the GPU, less {gb(cache)} of KV cache for {target.context} tokens "
        f"and {gb(target.reserve)} in reserve)"
    )
    if left <= 0:
        raise InputError(
            f"`budget` {label}: nothing is left for weights. Lower `context` or `reserve`."
        )
    return Budget(left, label, memory_target=replace(target, mac_gib=mac_gib))


def _memory(text: str) -> int:
    """Return bytes of memory, which is sold in powers of two, whichever unit is written."""
    match = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:GB|GiB)?\s*", text, re.IGNORECASE)
    if match is None or not int(match[1]):
        raise InputError(f"`budget` mac:{text}: write the Mac's memory like mac:64GB, or mac:this.")
    return int(match[1]) << 30


def _bytes_like(text: str, inventory: Inventory) -> int:
    if text in recipe_names() or text.endswith(".toml"):
        return plan_by_recipe(inventory, load_recipe(text)).total_bytes
    folder = user_path(text)
    if not text or not folder.is_dir():
        names = ", ".join(recipe_names())
        raise InputError(f"`budget` like:{text}: neither a folder nor a recipe. Recipes: {names}.")
    checkpoint = open_folder(folder)
    stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    checkpoint.close()
    return stored
