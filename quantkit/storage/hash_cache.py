"""Hashes of large files, remembered in quantkit's cache while the files do not change."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantkit.errors import OutputError
from quantkit.progress import Stage
from quantkit.storage.hashing import hash_file
from quantkit.storage.json_files import dump_json, write_atomically
from quantkit.storage.paths import cache_folder

_FILE = "hashes.json"
_SMALL = 1_000_000  # bytes that are hashed as fast as looked up
_SETTLED_NS = 2_000_000_000  # age at which a later change must change the times, too
_MOST = 1000  # files


def remembered_hash(path: Path, name: str, progress: Stage | None = None) -> str:
    """Return the sha256 of a file as `hash_file` does, or the one remembered for it.

    A file with the same number, size and times as before counts as unchanged.
    """
    state = _state(path)
    if state is None or state[0] < _SMALL:
        return hash_file(path, name, progress)
    key = str(path.resolve())
    entry = _read().get(key)
    if isinstance(entry, dict) and entry.get("state") == state:
        if progress:
            progress(state[0], name)
        return str(entry["sha256"])
    sha256 = hash_file(path, name, progress)
    if _state(path) == state and time.time_ns() - max(state[2:]) > _SETTLED_NS:
        _remember(key, {"state": state, "sha256": sha256})
    return sha256


def _state(path: Path) -> list[int] | None:
    """Return the size, number and times of a plain file, None without one."""
    with suppress(OSError):
        if path.is_file():
            stat = path.stat()
            return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    return None


def _read() -> dict[str, Any]:
    with suppress(OSError, ValueError):
        entries = json.loads((cache_folder() / _FILE).read_text())
        if isinstance(entries, dict):
            return entries
    return {}


def _remember(key: str, entry: dict[str, Any]) -> None:
    entries = _read()
    entries.pop(key, None)
    entries[key] = entry
    kept = dict(list(entries.items())[-_MOST:])
    with suppress(OSError, OutputError):  # without a cache everything works, only slower
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_atomically(cache_folder() / _FILE, dump_json(kept))
