"""Documents: read from a file, the Hub or the shipped set, and rendered to token ids."""

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from quantkit.calibration.chat_template import (
    PINNED_DATE,
    NoTextError,
    has_chat_template,
    normalize_messages,
    parsed,
    render_chat,
    spoken,
    without_nulls,
)
from quantkit.calibration.fingerprint import passages
from quantkit.calibration.splits import Document
from quantkit.errors import CacheWarning, CalibrationError, InputError, first_line
from quantkit.storage.paths import user_path

DEFAULT = "default"
CHAT = "chat"
KINDS = ("prose", "code", CHAT, "maths")  # of the shipped set, in turn
_LOADERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text", ".parquet": "parquet"}
_STRETCH = 2000  # characters
_TEXTS = ("text", "content", "document")
_DIALOGUES = ("messages", "conversations", "conversation")
Record = Mapping[str, Any]


class RowError(CalibrationError):
    """A row that the chat template refuses."""


def open_documents(name: str, seed: int, split: str) -> list[Iterator[Record]]:
    """Open the documents of every kind of text, each kind shuffled by `seed`.

    `name` is a Hub data set, a file, or `default`, whose files are already split. Raises
    CalibrationError.
    """
    from datasets import IterableDataset, load_dataset, logging

    logging.set_verbosity(logging.CRITICAL)  # failures raise exceptions
    streams = []
    for loader_name, options in _loaders(name, split):
        try:
            if loader_name == "text":
                data = IterableDataset.from_generator(_stretches, gen_kwargs=options)
            else:
                data = load_dataset(
                    loader_name,
                    split="train",
                    streaming=True,
                    cache_dir=_datasets_cache(),
                    **options,
                )
            streams.append(_read(data.shuffle(seed=seed, buffer_size=2000), name))
        except Exception as exc:  # readers of data sets raise anything
            raise CalibrationError(
                f"{name}: neither a file nor a loadable data set ({first_line(exc)})."
            ) from exc
    return streams


def _loaders(name: str, split: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the loader of every kind of text, with its options. Raises CalibrationError."""
    path = user_path(name)
    if not name or path.is_dir() or set(name) & set("*?[]"):
        raise CalibrationError(f"text {name!r}: name a plain file or a Hub data set.")
    if name == DEFAULT:
        folder = Path(__file__).parent / "data" / split
        return [("json", {"data_files": str(folder / f"{kind}.jsonl")}) for kind in KINDS]
    if path.is_file():
        loader = _LOADERS.get(path.suffix.lower())
        if loader is None:
            raise CalibrationError(
                f"{path}: not a kind of file to calibrate on. Give {', '.join(_LOADERS)}."
            )
        if path.stat().st_size == 0:
            raise CalibrationError(f"{path}: is empty.")
        if loader == "json":
            _require_records(path)
        return [(loader, {"path": path} if loader == "text" else {"data_files": str(path)})]
    return [(name, {})]


def _stretches(path: Path) -> Iterator[Record]:
    """Yield stretches of whole paragraphs of a text file, as long as a document."""
    text = ""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if not line.strip() and len(text) >= _STRETCH:
                yield {"text": text.strip()}
                text = ""
            text += line
    if text.strip():
        yield {"text": text.strip()}


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


def _read(data: Any, name: str) -> Iterator[Record]:
    """Yield records. Raises CalibrationError for a file whose contents contradict its name."""
    try:
        yield from data
    except Exception as exc:
        raise CalibrationError(f"{name}: cannot be read ({first_line(exc)}).") from exc


def document_of(record: Record, tokenizer: Any, name: str) -> Document | None:
    """Return the document in a row, None if it holds no text. Raises CalibrationError, and
    RowError for a row that the chat template refuses.
    """
    for column in _DIALOGUES:
        if isinstance(messages := parsed(record.get(column)), list) and messages:
            where = f"{name}, column {column}"
            return _dialogue(messages, record.get("tools"), tokenizer, where)
    for column in _TEXTS:
        if isinstance(text := record.get(column), str):
            return _document(text, list(tokenizer.encode(text + "\n"))) if text else None
    if any(column in record for column in _TEXTS + _DIALOGUES):
        return None  # null, or an empty chat
    columns = ", ".join(map(repr, record)) or "no column"
    raise CalibrationError(
        f"{name}: has no text. Expected a column {', '.join(_TEXTS + _DIALOGUES)}; found {columns}."
    )


def _dialogue(messages: list[Any], tools: Any, tokenizer: Any, where: str) -> Document | None:
    try:
        chat = normalize_messages(messages)
        said = "\n".join(text for turn in chat for text in spoken(turn))
        content = list(tokenizer.encode(said + "\n"))
        if not has_chat_template(tokenizer):
            return _document(said, content)
        text = render_chat(tokenizer, chat, tools=without_nulls(parsed(tools)), today=PINNED_DATE)
    except NoTextError:
        return None
    except InputError as exc:
        raise RowError(f"{where}: {exc}.") from exc
    return _document(said, content, list(tokenizer.encode(text, add_special_tokens=False)))


def _document(text: str, content: list[int], rendered: list[int] | None = None) -> Document:
    hashed = int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")
    runs = passages(np.array([content])) if content else np.zeros(0, np.uint64)
    return Document(content if rendered is None else rendered, runs, hashed / 2**64)
