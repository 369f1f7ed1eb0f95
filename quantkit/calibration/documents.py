"""Documents: read from a file, the Hub or the shipped set, and rendered to token ids."""

import os
import warnings
from collections.abc import Iterator, Mapping
from datetime import date
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quantkit.calibration.chat_template import (
    NoTextError,
    has_chat_template,
    normalize_messages,
    parsed,
    render_chat,
    without_nulls,
)
from quantkit.errors import CacheWarning, CalibrationError, InputError, first_line
from quantkit.storage.paths import user_path

DEFAULT = "default"
CHAT = "chat"
KINDS = ("prose", "code", CHAT, "maths")  # of the shipped set, in turn
_LOADERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text", ".parquet": "parquet"}
_TEXTS = ("text", "content", "document")
_DIALOGUES = ("messages", "conversations", "conversation")
_TODAY = date(2025, 8, 5)  # for templates, so that the same text always gives the same tokens
Record = Mapping[str, Any]


class RowError(CalibrationError):
    """A row that the chat template refuses."""


def open_documents(name: str, seed: int) -> list[Iterator[Mapping[str, Any]]]:
    """Open the documents of every kind of text, each kind shuffled by `seed`.

    `name` is a Hub data set, a file, or `default`. Raises CalibrationError.
    """
    from datasets import load_dataset, logging

    logging.set_verbosity(logging.CRITICAL)  # failures raise exceptions
    path = user_path(name)
    if not name or path.is_dir() or set(name) & set("*?[]"):
        raise CalibrationError(f"text {name!r}: name a plain file or a Hub data set.")
    if name == DEFAULT:
        folder = Path(__file__).parent / "data"
        wanted = [("json", {"data_files": str(folder / f"{kind}.jsonl")}) for kind in KINDS]
    elif path.is_file():
        loader = _LOADERS.get(path.suffix.lower())
        if loader is None:
            raise CalibrationError(
                f"{path}: not a kind of file to calibrate on. Give {', '.join(_LOADERS)}."
            )
        if path.stat().st_size == 0:
            raise CalibrationError(f"{path}: is empty.")
        if loader == "json":
            _require_records(path)
        options = {"data_files": str(path)}
        wanted = [(loader, options | ({"sample_by": "paragraph"} if loader == "text" else {}))]
    else:
        wanted = [(name, {})]
    streams = []
    for loader_name, options in wanted:
        try:
            data = load_dataset(
                loader_name, split="train", streaming=True, cache_dir=_datasets_cache(), **options
            )
            streams.append(_read(data.shuffle(seed=seed, buffer_size=2000), name))
        except Exception as exc:  # readers of data sets raise anything
            raise CalibrationError(
                f"{name}: neither a file nor a loadable data set ({first_line(exc)})."
            ) from exc
    return streams


@lru_cache(maxsize=1)
def _spare_cache() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="quantkit-")


def _datasets_cache() -> str | None:
    """Return a writable cache for `datasets`.

    None means its own; the alternative is removed when the process ends.
    """
    from datasets import config

    try:
        Path(config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
        if os.access(config.HF_DATASETS_CACHE, os.W_OK):
            return None
    except OSError:
        pass
    warnings.warn(
        f"{config.HF_DATASETS_CACHE} cannot be written: data sets are not cached. "
        "Set HF_HOME to a writable folder.",
        CacheWarning,
        stacklevel=2,
    )
    return _spare_cache().name


def _require_records(path: Path) -> None:
    """Check that a JSON file starts like records, since its reader crashes on some other files.

    Raises CalibrationError.
    """
    with open(path, "rb") as file:
        start = file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start not in (b"{", b"["):
        raise CalibrationError(f"{path}: cannot be read (it does not start with a JSON object).")


def _read(data: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """Yield records. Raises CalibrationError for a file whose contents contradict its name."""
    try:
        yield from data
    except Exception as exc:
        raise CalibrationError(f"{name}: cannot be read ({first_line(exc)}).") from exc


def tokens_of(record: Mapping[str, Any], tokenizer: Any, name: str) -> list[int] | None:
    """Return the token ids of a row, None if it holds no text. Raises CalibrationError, and
    RowError for a row that the chat template refuses.
    """
    for column in _DIALOGUES:
        if isinstance(messages := parsed(record.get(column)), list) and messages:
            where = f"{name}, column {column}"
            return _dialogue(messages, record.get("tools"), tokenizer, where)
    for column in _TEXTS:
        if isinstance(text := record.get(column), str):
            return list(tokenizer.encode(text + "\n")) if text else None
    if any(column in record for column in _TEXTS + _DIALOGUES):
        return None  # null, or an empty chat
    columns = ", ".join(map(repr, record)) or "no column"
    raise CalibrationError(
        f"{name}: has no text. Expected a column {', '.join(_TEXTS + _DIALOGUES)}; found {columns}."
    )


def _dialogue(messages: list[Any], tools: Any, tokenizer: Any, where: str) -> list[int] | None:
    try:
        chat = normalize_messages(messages)
        if not has_chat_template(tokenizer):
            return list(tokenizer.encode("\n".join(turn["content"] for turn in chat) + "\n"))
        text = render_chat(tokenizer, chat, tools=without_nulls(parsed(tools)), today=_TODAY)
    except NoTextError:
        return None
    except InputError as exc:
        raise RowError(f"{where}: {exc}.") from exc
    return list(tokenizer.encode(text, add_special_tokens=False))
