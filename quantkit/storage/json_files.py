"""JSON, TOML and text files: read with clear errors, written atomically."""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantkit.errors import InputError, OutputError, PlanError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT_VERSION = 3  # of the plans and reports that quantkit writes


def dump_json(value: Any) -> str:
    """Format JSON as quantkit writes it: indented, in the given order, with a final newline."""
    return json.dumps(value, indent=2) + "\n"


def read_text(path: Path, error: type[InputError] = InputError) -> str:
    """Return a file's text. Raises `error` if it is missing, not a plain file, or not UTF-8."""
    if path.exists() and not path.is_file():
        raise error(f"{path}: not a plain file.")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as exc:
        raise error(f"{path}: no such file.") from exc
    except UnicodeDecodeError as exc:
        raise error(f"{path}: not UTF-8 text.") from exc
    except OSError as exc:
        raise error(f"{path}: cannot be read ({exc.strerror}).") from exc


def load_json(path: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """Return the object in a JSON file. Raises `error` if it is missing or holds something else."""
    try:
        value = json.loads(read_text(path, error).removeprefix("\ufeff"))
    except (ValueError, RecursionError) as exc:
        raise error(f"{path}: not valid JSON ({exc}).") from exc
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def whole_lines(path: Path) -> list[Any]:
    """Return the JSON values of all lines; the last one may be torn, and is then cut off.

    Raises OutputError.
    """
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as exc:
        raise OutputError(f"{path}: is damaged. Remove it, and run the command again.") from exc


def load_toml(path: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """Return the table in a TOML file. Raises `error` if it is missing or not valid."""
    try:
        return tomllib.loads(read_text(path, error))
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise error(f"{path}: not valid TOML ({exc}).") from exc


def write_atomically(path: Path, text: str | bytes) -> None:
    """Write text or bytes to `path` completely or not at all, even across a power cut.

    Raises OutputError.
    """
    write_bytes_atomically(path, encoded(text))


def encoded(text: str | bytes) -> bytes:
    """Return `text` in UTF-8; surrogates of undecodable file names become escapes. Bytes stay."""
    return text if isinstance(text, bytes) else text.encode("utf-8", errors="backslashreplace")


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` completely or not at all. Raises OutputError."""
    path = path.resolve()  # follow links
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is a folder or a device. Choose a file.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as exc:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({exc.strerror}).") from exc


def require_kind(data: Mapping[str, Any], kind: str, where: str) -> None:
    """Check that `data` is a `kind` of the version that this quantkit reads. Raises PlanError."""
    if data.get("kind") != kind:
        raise PlanError(f"{where}: expected a quantkit {kind}, found {data.get('kind')!r}.")
    if data.get("version") != FORMAT_VERSION:
        raise PlanError(
            f"{where}: {kind} of version {data.get('version')!r}, this quantkit reads "
            f"{FORMAT_VERSION}. Make it again with this version."
        )
