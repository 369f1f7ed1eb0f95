"""Calibration text: from the Hub, a file of the user's, or the small set that ships with quantkit.

Every fifth sequence is held out: it is never calibrated on, so that predictions can be checked on
text they have not seen.
"""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from quantkit.artifacts.profile import CalibrationText
from quantkit.backend import mx  # noqa: F401  (before mlx-lm, which brings the tokenizer)
from quantkit.calibration.chat_template import (
    NoTextError,
    has_chat_template,
    normalize_messages,
    parsed,
    render_chat,
    without_nulls,
)
from quantkit.checkpoint import stock
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.tensor_map import optional_int, text_scope
from quantkit.errors import CacheWarning, CalibrationError, InputError, first_line
from quantkit.storage.paths import data_folder, user_path

DEFAULT = "default"
CHAT = "chat"
_KINDS = ("prose", "code", CHAT, "maths")  # of the default set, in turn
_LICENCE = "public domain, PSF-2.0, MIT, Apache-2.0 (evals/calibration/README.md)"
_HELD_OUT = 5
_LOADERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text", ".parquet": "parquet"}
_TEXTS = ("text", "content", "document")
_DIALOGUES = ("messages", "conversations", "conversation")
_MOST_FAILED = 100  # rows, of which none can be rendered
_PASSAGE = 16  # tokens
_SKETCH = 2048  # passages
_FEWEST = 4  # passages to judge a sequence by
_TODAY = date(2025, 8, 5)  # for templates, so that the same text gives the same tokens every day


class _RowError(CalibrationError):
    """One row that cannot be rendered."""


@dataclass(frozen=True)
class CalibrationSpec:
    """What to calibrate on: a Hub data set, a file, or `default`, and how much of it."""

    name: str = DEFAULT
    tokens: int = 4096
    sequence_length: int = 256
    seed: int = 0

    @property
    def sequences(self) -> int:
        return max(1, self.tokens // self.sequence_length)


@dataclass(frozen=True)
class Text:
    """Token ids (sequences, sequence length): those to calibrate on, and those held out.

    `kinds` names the kind of text of every sequence that is held out.
    """

    about: CalibrationText
    tokens: np.ndarray
    held_out: np.ndarray
    kinds: tuple[str, ...]


def read_text(checkpoint: Checkpoint, request: CalibrationSpec) -> Text:
    """Tokenize what `request` asks for with the checkpoint's own tokenizer and chat template.

    Gives fewer sequences where there is not enough text. Raises CalibrationError.
    """
    _require_possible(checkpoint, request)
    tokenizer = load_tokenizer(checkpoint)
    rows = optional_int(text_scope(checkpoint.config), "vocab_size")
    name = Path(request.name).name if user_path(request.name).exists() else request.name
    names = _KINDS if request.name == DEFAULT else (name,)
    skipped: Counter[str] = Counter()
    every = [_sequences(rows, tokenizer, request, skipped) for rows in _records(request)]
    kinds = dict(zip(names, every, strict=True))
    chosen: list[list[int]] = []
    held_out: list[tuple[str, list[int]]] = []
    while kinds and (len(chosen) < request.sequences or len(held_out) < request.sequences):
        for kind, sequences in list(kinds.items()):
            part = list(islice(sequences, _HELD_OUT))
            if not part:
                kinds.pop(kind)
            chosen += part[: _HELD_OUT - 1]
            held_out += [(kind, sequence) for sequence in part[_HELD_OUT - 1 :]]
    if not chosen:
        without = f" ({skipped.total()} rows without text were skipped)" if skipped else ""
        raise CalibrationError(
            f"{request.name}: holds less than one sequence of {request.sequence_length} tokens"
            f"{without}. Give more text, or a smaller --sequence-length."
        )
    tokens = np.array(_in_turn(chosen, request), np.int32)
    if rows is not None and (largest := int(tokens.max())) >= rows:
        raise CalibrationError(
            f"{checkpoint.name}: its tokenizer gives token {largest}, but the model has {rows}."
        )
    about = CalibrationText(
        name=name,
        licence=_LICENCE if request.name == DEFAULT else "unknown",
        sequences=len(tokens),
        sequence_length=request.sequence_length,
        seed=request.seed,
        sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
        sketch=sketch(tokens),
        skipped_rows=skipped.total(),
    )
    held_out = held_out[: request.sequences]
    rest = np.array([sequence for _, sequence in held_out], np.int32)
    rest = rest.reshape(-1, request.sequence_length)
    return Text(about, tokens, rest, tuple(kind for kind, _ in held_out))


def sketch(tokens: np.ndarray) -> str:
    """A sample of the passages of `tokens` (sequences, length), by which `overlaps` tells other
    text from it: `m:` and the hashes, 8 hex digits each, that m divides; m is the least power of
    two that leaves so few."""
    passages, modulus = _passages(tokens), 1
    while len(passages) > _SKETCH:
        modulus *= 2
        passages = passages[passages % modulus == 0]
    return f"{modulus}:" + "".join(f"{hashed:08x}" for hashed in passages)


def overlaps(tokens: np.ndarray, sketched: str) -> bool:
    """Whether some of `tokens` (sequences, length) is from the text that was sketched.

    A tenth of all different passages, or half of a sequence's, have to be known, as far as the
    sketch samples them: dialogues share a template's opening, which is less than that. Of texts of
    a million tokens a sketch holds every five hundredth passage.
    """
    divisor, _, text = sketched.partition(":")
    modulus = int(divisor or 1)
    known = np.array([int(text[i : i + 8], 16) for i in range(0, len(text), 8)], np.uint32)

    def sampled(some: np.ndarray) -> np.ndarray:
        passages = _passages(some)
        return np.isin(passages[passages % modulus == 0], known)

    whole = sampled(tokens)
    if len(whole) and whole.mean() > 0.1 and (whole.sum() > 2 or whole.mean() > 0.5):
        return True
    each = (sampled(sequence[None]) for sequence in tokens)
    return any(len(found) >= _FEWEST and found.mean() > 0.5 for found in each)


def _passages(tokens: np.ndarray) -> np.ndarray:
    """Hashes (uint32, sorted, each once) of all runs of tokens of one length."""
    length = min(_PASSAGE, tokens.shape[1])
    runs = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), length, axis=1)
    factors = np.random.default_rng(0).integers(1, 1 << 63, length, np.uint64) * 2 + 1
    mixed = (runs * factors).sum(axis=-1, dtype=np.uint64)  # wraps around, as hashes do
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def _in_turn(chosen: list[list[int]], request: CalibrationSpec) -> list[list[int]]:
    """As many as were asked for, from all kinds alike."""
    if request.name != DEFAULT:
        return chosen[: request.sequences]
    step = _HELD_OUT - 1
    blocks = [chosen[i : i + step] for i in range(0, len(chosen), step)]
    rounds = [blocks[i : i + len(_KINDS)] for i in range(0, len(blocks), len(_KINDS))]
    mixed = [block[i] for kinds in rounds for i in range(step) for block in kinds if i < len(block)]
    return mixed[: request.sequences]


def _require_possible(checkpoint: Checkpoint, request: CalibrationSpec) -> None:
    for value, option in (
        (request.tokens, "--tokens"),
        (request.sequence_length - 1, "--sequence-length"),
    ):
        if value < 1:
            raise CalibrationError(f"{option} is too small. A sequence has 2 tokens or more.")
    longest = optional_int(checkpoint.config, "max_position_embeddings", "n_positions")
    if longest is not None and request.sequence_length > longest:
        raise CalibrationError(
            f"--sequence-length {request.sequence_length} is more than the {longest} tokens that "
            f"{checkpoint.name} takes."
        )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """mlx-lm's tokenizer of a checkpoint. Raises CalibrationError, or InputError for one that wants
    to run code of its own."""
    return stock.load_tokenizer(
        checkpoint.path(""), checkpoint.name, trust_remote_code=checkpoint.trust_remote_code
    )


def _records(request: CalibrationSpec) -> list[Iterator[Mapping[str, Any]]]:
    """The documents of every kind of text, each kind shuffled by the seed."""
    from datasets import load_dataset, logging

    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is raised, too
    path = user_path(request.name)
    if not request.name or path.is_dir() or set(request.name) & set("*?[]"):
        raise CalibrationError(f"text {request.name!r}: name a plain file or a Hub data set.")
    if request.name == DEFAULT:
        folder = data_folder("evals") / "calibration"
        wanted = [("json", {"data_files": str(folder / f"{kind}.jsonl")}) for kind in _KINDS]
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
        wanted = [(request.name, {})]
    found = []
    for name, options in wanted:
        try:
            data = load_dataset(
                name, split="train", streaming=True, cache_dir=_datasets_cache(), **options
            )
            found.append(_read(data.shuffle(seed=request.seed, buffer_size=2000), request.name))
        except Exception as exc:  # whatever the readers of datasets stumble over
            raise CalibrationError(
                f"{request.name}: no file and no data set that can be loaded ({first_line(exc)})."
            ) from exc
    return found


@lru_cache(maxsize=1)
def _spare_cache() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="quantkit-")


def _datasets_cache() -> str | None:
    """A folder for the cache of `datasets` that can be written: None for its own, else one that is
    removed when the process ends."""
    from datasets import config

    try:
        Path(config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
        if os.access(config.HF_DATASETS_CACHE, os.W_OK):
            return None
    except OSError:
        pass
    warnings.warn(
        f"{config.HF_DATASETS_CACHE} cannot be written: data sets are not kept for later runs. "
        "Set HF_HOME to a folder that can.",
        CacheWarning,
        stacklevel=2,
    )
    return _spare_cache().name


def _require_records(path: Path) -> None:
    """Raises CalibrationError for a JSON file that does not start like records: its reader has been
    seen to crash on others."""
    with open(path, "rb") as file:
        start = file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start not in (b"{", b"["):
        raise CalibrationError(f"{path}: cannot be read (it does not start with a JSON object).")


def _read(data: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """Records one by one. Raises CalibrationError for a file that is not what its name says."""
    try:
        yield from data
    except Exception as exc:
        raise CalibrationError(f"{name}: cannot be read ({first_line(exc)}).") from exc


def _sequences(
    records: Iterator[Mapping[str, Any]],
    tokenizer: Any,
    request: CalibrationSpec,
    skipped: Counter[str],
) -> Iterator[list[int]]:
    """Yield documents one after the other, cut into sequences; the rest at the end is left.

    Rows whose text is null or empty, chats with images, and those that the chat template refuses
    are counted in `skipped`. Raises CalibrationError where it refuses every one.
    """
    held: list[int] = []
    rendered = failed = 0
    refusal: _RowError | None = None  # the first
    for record in records:
        try:
            tokens = _tokens(record, tokenizer, request.name)
        except _RowError as exc:
            failed += 1
            refusal = refusal or exc
            if failed == _MOST_FAILED and not rendered:
                break
            tokens = None
        if tokens is None:
            skipped[request.name] += 1
            continue
        rendered += 1
        held += tokens
        while len(held) >= request.sequence_length:
            yield held[: request.sequence_length]
            held = held[request.sequence_length :]
    if refusal and not rendered:  # it is not the rows, then
        raise refusal


def _tokens(record: Mapping[str, Any], tokenizer: Any, name: str) -> list[int] | None:
    """Return the token ids of a row, None if it holds no text. Raises CalibrationError."""
    for column in _DIALOGUES:
        if isinstance(messages := parsed(record.get(column)), list) and messages:
            where = f"{name}, column {column}"
            return _dialogue(messages, record.get("tools"), tokenizer, where)
    for column in _TEXTS:
        if isinstance(text := record.get(column), str):
            return list(tokenizer.encode(text + "\n")) if text else None
    if any(column in record for column in _TEXTS + _DIALOGUES):
        return None  # null, or an empty chat
    columns = ", ".join(map(repr, record)) or "none"
    raise CalibrationError(
        f"{name}: has no text: expected a column {', '.join(_TEXTS + _DIALOGUES)}; found {columns}."
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
        raise _RowError(f"{where}: {exc}.") from exc
    return list(tokenizer.encode(text, add_special_tokens=False))
