"""Budgets as people think of them, in bytes.

4.25bpw        bits per weight, everything stored counted
12GB, 48GiB    bytes
mac:64GB       what fits a Mac with that much memory; mac:this asks the machine
like:RECIPE    the bytes of a recipe's plan; like:FOLDER those of a repo
lossless       the smallest plan whose predicted loss is 0
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from quantkit.artifacts.inventory import Inventory
from quantkit.checkpoint.checkpoint import open_folder
from quantkit.errors import InputError
from quantkit.macs import MemoryTarget, cache_bytes, wired_by_default
from quantkit.planning.recipe import load_recipe, plan_by_recipe, recipe_names
from quantkit.storage.paths import user_path
from quantkit.units import gb, parse_bytes, parse_count

_NUMBER = re.compile(r"\s*[0-9]+(?:\.[0-9]*)?\s*", re.ASCII)
_BPW = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*bpw\s*", re.IGNORECASE)
_SPEED = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*tok/s\s*@\s*([^/]+)/s\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """At most `bytes` for all that is stored, and how that came about; None for `lossless`."""

    bytes: int | None
    about: str


def parse_budget(
    text: str, inventory: Inventory, config: Mapping[str, Any], room: MemoryTarget | None = None
) -> Budget:
    """What `text` allows. `config` is the checkpoint's. Raises InputError."""
    if text.strip().lower() == "lossless":
        return Budget(None, "lossless")
    if match := _BPW.fullmatch(text):
        return Budget(int(Fraction(match[1]) * inventory.parameters / 8), text.strip())
    kind, colon, what = text.partition(":")
    if colon and kind.lower() == "mac":
        return _mac(what, config, room or MemoryTarget())
    if colon and kind.lower() == "like":
        return Budget(_bytes_like(what, inventory), text)
    if colon:
        raise InputError(f"budget {text!r}: there is mac:64GB, mac:this, like:RECIPE, like:FOLDER.")
    if _NUMBER.fullmatch(text):
        number = text.strip()
        raise InputError(
            f"budget {text!r} has no unit. Write {number}bpw for bits per weight, or {number}GB."
        )
    try:
        return Budget(parse_bytes(text), text.strip())
    except InputError as exc:
        raise InputError(
            f"budget {text!r} is not understood. Write it like 4.25bpw, 12GB, 48GiB, mac:64GB, "
            "like:mxfp4-q8 or lossless."
        ) from exc


def parse_speed(text: str) -> tuple[int, int]:
    """(bytes that may be read per token, bytes per second) of `60tok/s@400GB/s`. Raises
    InputError."""
    match = _SPEED.fullmatch(text)
    bandwidth = parse_bytes(match[2]) if match else 0
    if match is None or not bandwidth or not Fraction(match[1]):
        raise InputError(
            f"speed {text!r}: write tokens a second at a memory bandwidth, like 60tok/s@400GB/s."
        )
    return int(bandwidth / Fraction(match[1])), bandwidth


def parse_room(context: str, reserve: str) -> MemoryTarget:
    """Raises InputError."""
    return MemoryTarget(parse_count(context), parse_bytes(reserve))


def _mac(what: str, config: Mapping[str, Any], room: MemoryTarget) -> Budget:
    if what.strip().lower() == "this":
        from quantkit.backend import wired_bytes  # mlx, only where the machine is asked

        wired, about = wired_bytes(), "mac:this"
    else:
        memory = _memory(what)
        wired = wired_by_default(memory)
        about = f"mac:{what.strip()}"
    cache = cache_bytes(config, room.context)
    left = wired - cache - room.reserve
    said = (
        f"{about} ({gb(wired)} for the GPU, less {gb(cache)} of KV cache for {room.context} tokens "
        f"and {gb(room.reserve)} in reserve)"
    )
    if left <= 0:
        raise InputError(f"budget {said}: nothing is left. Give less --context or --reserve.")
    return Budget(left, said)


def _memory(what: str) -> int:
    """Memory is sold in powers of two, whichever unit is written."""
    match = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:GB|GiB)?\s*", what, re.IGNORECASE)
    if match is None or not int(match[1]):
        raise InputError(f"budget mac:{what}: write the Mac's memory like mac:64GB, or mac:this.")
    return int(match[1]) << 30


def _bytes_like(what: str, inventory: Inventory) -> int:
    if what in recipe_names() or what.endswith(".toml"):
        return plan_by_recipe(inventory, load_recipe(what)).total_bytes
    folder = user_path(what)
    if not what or not folder.is_dir():
        names = ", ".join(recipe_names())
        raise InputError(f"budget like:{what}: neither a folder nor a recipe. Recipes: {names}.")
    checkpoint = open_folder(folder)
    stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    checkpoint.close()
    return stored
