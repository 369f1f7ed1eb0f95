"""SHA-256 of JSON values and files."""

import hashlib
import json
from pathlib import Path
from typing import Any

from quantkit.errors import SourceError
from quantkit.progress import Stage

_BLOCK = 8_000_000  # bytes


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path, name: str, progress: Stage | None = None) -> str:
    """Return the sha256 of a file, which errors and `progress` (bytes) call `name`.

    Raises SourceError when the file cannot be read.
    """
    sha = hashlib.sha256()
    if path.exists() and not path.is_file():
        raise SourceError(f"{name}: not a plain file.")
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                sha.update(block)
                if progress:
                    progress(len(block), name)
    except OSError as exc:
        raise SourceError(f"{name}: cannot be read ({exc.strerror}).") from exc
    return sha.hexdigest()
