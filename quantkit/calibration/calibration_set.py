"""The calibration set: the token sequences of one split of a text."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.artifacts.calibration import CalibrationText
from quantkit.backend import mx  # noqa: F401  (before mlx-lm, which brings the tokenizer)
from quantkit.calibration.documents import (
    DEFAULT,
    KINDS,
    Record,
    RowError,
    document_of,
    open_documents,
)
from quantkit.calibration.fingerprint import sketch
from quantkit.calibration.splits import CALIBRATE, EVALUATE, Assigned, Document, assign
from quantkit.checkpoint import stock
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import CalibrationError
from quantkit.storage.paths import user_path

_LICENCE = "public domain, PSF-2.0, MIT, Apache-2.0 (quantkit/calibration/data/README.md)"
_MOST_FAILED = 100  # rows that the chat template refuses, without one that it renders
_FEWEST_DOCUMENTS = 64  # to evaluate on, if there are as many


@dataclass(frozen=True)
class CalibrationSpec:
    """A calibration text to read: a Hub data set, a file, or `default`, and its size in tokens."""

    name: str = DEFAULT
    tokens: int = 1536
    sequence_length: int = 256
    seed: int = 0

    @property
    def sequences(self) -> int:
        """The number of sequences, at least 1."""
        return max(1, self.tokens // self.sequence_length)


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids `tokens` (sequences, length) of one split, and where they come from.

    `documents` (sequences, length) numbers the document of every token, `kinds` names the kind of
    text of every sequence.
    """

    text: CalibrationText
    tokens: np.ndarray
    documents: np.ndarray
    kinds: tuple[str, ...]


Sequence = tuple[str, list[int], list[int]]
"""A kind of text, token ids, and the document of every token."""


def read_calibration_set(
    checkpoint: Checkpoint, spec: CalibrationSpec, split: str = CALIBRATE
) -> CalibrationSet:
    """Tokenize a split of the text of `spec` with the checkpoint's tokenizer and chat template.

    The kinds of the shipped text take turns. Returns fewer sequences if the text is too short.
    Raises CalibrationError.
    """
    _require_possible(checkpoint, spec)
    tokenizer = load_tokenizer(checkpoint)
    name, skipped = _label(spec), Counter[str]()
    kinds = KINDS if spec.name == DEFAULT else (name,)
    rows_of = open_documents(spec.name, spec.seed, split)
    documents = [_of_split(_documents(r, tokenizer, spec, skipped), spec, split) for r in rows_of]
    cut = partial(_sequences, length=spec.sequence_length, first=_first_tokens(tokenizer))
    chosen = _in_turn(list(map(cut, kinds, documents)), spec.sequences)
    if not chosen:
        without = f" ({skipped.total()} rows without text were skipped)" if skipped else ""
        raise CalibrationError(
            f"{spec.name}: the documents to {split} on have less than one sequence of "
            f"{spec.sequence_length} tokens{without}. Give more text, or a smaller "
            "`sequence_length`."
        )
    tokens = np.array([ids for _, ids, _ in chosen], np.int32)
    _require_in_vocabulary(checkpoint, tokens)
    numbers = _numbered(chosen)
    text = CalibrationText(
        name=name,
        licence=_LICENCE if spec.name == DEFAULT else "unknown",
        sequences=len(tokens),
        sequence_length=spec.sequence_length,
        seed=spec.seed,
        sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
        sketch=sketch(tokens),
        skipped_rows=skipped.total(),
        split=split,
        documents=int(numbers.max()) + 1,
    )
    return CalibrationSet(text, tokens, numbers, tuple(kind for kind, _, _ in chosen))


def _first_tokens(tokenizer: Any) -> list[int]:
    """Return the token that begins every text, if the tokenizer adds one."""
    first: list[int] = list(tokenizer.encode(""))[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _require_in_vocabulary(checkpoint: Checkpoint, tokens: np.ndarray) -> None:
    vocabulary = checkpoint.settings.vocabulary
    if vocabulary is not None and (largest := int(tokens.max())) >= vocabulary:
        raise CalibrationError(
            f"{checkpoint.name}: its tokenizer gives token {largest}, the model has {vocabulary}."
        )


def _label(spec: CalibrationSpec) -> str:
    return Path(spec.name).name if user_path(spec.name).exists() else spec.name


def _in_turn(streams: list[Iterator[Sequence]], count: int) -> list[Sequence]:
    """Return up to `count` sequences, one of each stream in turn as long as it lasts."""
    chosen: list[Sequence] = []
    while streams and len(chosen) < count:
        taken = [next(stream, None) for stream in streams]
        streams = [stream for stream, one in zip(streams, taken, strict=True) if one]
        chosen += [one for one in taken if one]
    return chosen[:count]


def _numbered(chosen: list[Sequence]) -> np.ndarray:
    """Number the documents (sequences, length) of all kinds from 0."""
    keys = [[(kind, number) for number in numbers] for kind, _, numbers in chosen]
    order = {key: i for i, key in enumerate(dict.fromkeys(key for row in keys for key in row))}
    return np.array([[order[key] for key in row] for row in keys], np.int32)


def _require_possible(checkpoint: Checkpoint, spec: CalibrationSpec) -> None:
    for value, field in ((spec.tokens, "tokens"), (spec.sequence_length - 1, "sequence_length")):
        if value < 1:
            raise CalibrationError(f"`{field}` is too small. A sequence has 2 tokens or more.")
    longest = checkpoint.settings.context
    if longest is not None and spec.sequence_length > longest:
        raise CalibrationError(
            f"`sequence_length` {spec.sequence_length} exceeds the context of {checkpoint.name}, "
            f"{longest} tokens."
        )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return mlx-lm's tokenizer of a checkpoint. Raises CalibrationError or UntrustedCodeError."""
    return stock.load_tokenizer(
        checkpoint.path(""), checkpoint.name, trust_remote_code=checkpoint.trust_remote_code
    )


def _documents(
    rows: Iterator[Record], tokenizer: Any, spec: CalibrationSpec, skipped: Counter[str]
) -> Iterator[Document]:
    """Yield the documents of `rows`.

    Rows without text, chats with images, and rows that the chat template refuses are counted in
    `skipped`. Raises the first refusal if the template refuses every row.
    """
    rendered = failed = 0
    refusal: RowError | None = None  # the first one
    for row in rows:
        try:
            document = document_of(row, tokenizer, spec.name)
        except RowError as exc:
            failed += 1
            refusal = refusal or exc
            if failed == _MOST_FAILED and not rendered:
                break
            document = None
        if document is None:
            skipped[spec.name] += 1
            continue
        rendered += 1
        yield document
    if refusal and not rendered:  # the template is at fault, not the rows
        raise refusal


def _of_split(
    documents: Iterator[Document], spec: CalibrationSpec, split: str
) -> Iterator[tuple[int, list[int]]]:
    """Yield the number and the tokens of the documents of a split.

    To evaluate on, no document gives more than its share of the sequences.
    """
    longest = spec.sequence_length * max(1, spec.sequences // _FEWEST_DOCUMENTS)
    assigned: Iterator[Assigned]
    if spec.name == DEFAULT:  # its files are split
        assigned = ((split, number, document) for number, document in enumerate(documents))
    else:
        assigned = assign(documents, spec.name)
    used = Counter[int]()
    for assigned_split, number, document in assigned:
        if assigned_split != split:
            continue
        tokens = document.tokens
        if split == EVALUATE:
            tokens = tokens[: max(0, longest - used[number])]
        used[number] += len(tokens)
        yield number, tokens


def _sequences(
    kind: str, documents: Iterator[tuple[int, list[int]]], length: int, first: list[int]
) -> Iterator[Sequence]:
    """Yield consecutive documents, cut into sequences; the remainder at the end is dropped.

    Every sequence begins with the tokens `first`, without which some models (Gemma) predict badly.
    """
    ids: list[int] = []
    numbers: list[int] = []
    for number, tokens in documents:
        ids += tokens
        numbers += [number] * len(tokens)
        while ids:
            added = [] if ids[: len(first)] == first else first
            count = length - len(added)
            if len(ids) < count:
                break
            yield kind, added + ids[:count], numbers[:1] * len(added) + numbers[:count]
            ids, numbers = ids[count:], numbers[count:]
