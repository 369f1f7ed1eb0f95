"""Parse and format sizes, token counts and bits per weight."""

import re
from fractions import Fraction

from quantkit.errors import InputError

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as `5GB` (10^9), `48GiB` (2^30) or `1024B`; 0 needs no unit.

    Raises InputError for a negative or unreadable size, or a missing or unknown unit.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InputError(f"size {text!r} is not a number and a unit. Write it like 5GB or 48GiB.")
    number, unit = match.groups()
    if not unit and Fraction(number):
        raise InputError(f"size {text!r} has no unit. Write it like {text.strip()}GB or 48GiB.")
    if not unit:
        return 0
    if unit.upper() not in _UNITS:
        raise InputError(f"size {text!r}: unknown unit {unit!r}. Use MB, GB, MiB or GiB.")
    return int(Fraction(number) * _UNITS[unit.upper()])


def parse_count(text: str) -> int:
    """Return a number of tokens from `4096` or `32k` (1024 each). Raises InputError."""
    match = re.fullmatch(r"\s*([0-9]{1,12})\s*([kK]?)\s*", text)
    if match is None:
        raise InputError(f"{text!r} is not a number of tokens. Write it like 4096 or 32k.")
    return int(match[1]) * (1024 if match[2] else 1)


def bits_per_weight(stored_bytes: int, parameters: int) -> float:
    """Return all stored bits divided by the parameters of the source."""
    return 8 * stored_bytes / parameters if parameters else 0.0


def gb(stored_bytes: int) -> str:
    """Format bytes in decimal gigabytes, the unit of published cards."""
    return f"{stored_bytes / 10**9:.2f} GB"


def gib(stored_bytes: int) -> str:
    """Format bytes in binary gigabytes, the unit in which memory is sold."""
    return f"{stored_bytes / 2**30:.2f} GiB"


def size(stored_bytes: int) -> str:
    """Format bytes in the largest decimal unit that is not above them."""
    for unit in ("GB", "MB", "kB"):
        scale = {"GB": 10**9, "MB": 10**6, "kB": 10**3}[unit]
        if stored_bytes >= scale:
            return f"{stored_bytes / scale:.2f} {unit}"
    return f"{stored_bytes} B"


def plural(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 weight` or `3 weights`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def like_others(number: int) -> str:
    """Return `, like 3 others` after the first of several, nothing after the only one."""
    return f", like {plural(number - 1, 'other')}" if number > 1 else ""


def count(parameters: int) -> str:
    """Format a parameter count as `20.91B`, `134.5M` or `12.3k`."""
    for scale, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= scale:
            return f"{parameters / scale:.2f}{unit}"
    return str(parameters)


def version_numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version such as `0.32.4`, to compare it."""
    return tuple(int(number) for number in text.split(".")[:3] if number.isdigit())
