"""The calibration set: token sequences to calibrate on, and held-out ones.

Every fifth sequence is held out: it is never calibrated on, so that predictions can be checked on
unseen text.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.artifacts.calibration import CalibrationText
from quantkit.backend import mx  # noqa: F401  (before mlx-lm, which brings the tokenizer)
from quantkit.calibration.documents import DEFAULT, KINDS, RowError, open_documents, tokens_of
from quantkit.calibration.fingerprint import sketch
from quantkit.checkpoint import stock
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import CalibrationError
from quantkit.storage.paths import user_path

_LICENCE = "public domain, PSF-2.0, MIT, Apache-2.0 (quantkit/calibration/data/README.md)"
_HELD_OUT = 5
_MOST_FAILED = 100  # rows that the chat template refuses, without one that it renders


@dataclass(frozen=True)
class CalibrationSpec:
    """A calibration text to read: a Hub data set, a file, or `default`, and its size in tokens."""

    name: str = DEFAULT
    tokens: int = 4096
    sequence_length: int = 256
    seed: int = 0

    @property
    def sequences(self) -> int:
        """The number of sequences, at least 1."""
        return max(1, self.tokens // self.sequence_length)


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids (sequences, sequence length): `tokens` to calibrate on, and `held_out` ones.

    `kinds` names the kind of text of every held-out sequence.
    """

    text: CalibrationText
    tokens: np.ndarray
    held_out: np.ndarray
    kinds: tuple[str, ...]


def read_calibration_set(checkpoint: Checkpoint, spec: CalibrationSpec) -> CalibrationSet:
    """Tokenize the text of `spec` with the checkpoint's tokenizer and chat template.

    Returns fewer sequences if the text is too short. Raises CalibrationError.
    """
    _require_possible(checkpoint, spec)
    tokenizer = load_tokenizer(checkpoint)
    vocabulary = checkpoint.settings.vocabulary
    name, skipped = _label(spec), Counter[str]()
    streams = [
        _sequences(documents, tokenizer, spec, skipped)
        for documents in open_documents(spec.name, spec.seed)
    ]
    kinds = KINDS if spec.name == DEFAULT else (name,)
    chosen, held_out = _split(dict(zip(kinds, streams, strict=True)), spec.sequences)
    if not chosen:
        without = f" ({skipped.total()} rows without text were skipped)" if skipped else ""
        raise CalibrationError(
            f"{spec.name}: has less than one sequence of {spec.sequence_length} tokens"
            f"{without}. Give more text, or a smaller `sequence_length`."
        )
    tokens = np.array(_in_turn(chosen, spec), np.int32)
    if vocabulary is not None and (largest := int(tokens.max())) >= vocabulary:
        raise CalibrationError(
            f"{checkpoint.name}: its tokenizer gives token {largest}, the model has {vocabulary}."
        )
    text = CalibrationText(
        name=name,
        licence=_LICENCE if spec.name == DEFAULT else "unknown",
        sequences=len(tokens),
        sequence_length=spec.sequence_length,
        seed=spec.seed,
        sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
        sketch=sketch(tokens),
        skipped_rows=skipped.total(),
    )
    held_out = held_out[: spec.sequences]
    held_out_tokens = np.array([sequence for _, sequence in held_out], np.int32)
    held_out_tokens = held_out_tokens.reshape(-1, spec.sequence_length)
    return CalibrationSet(text, tokens, held_out_tokens, tuple(kind for kind, _ in held_out))


def _label(spec: CalibrationSpec) -> str:
    return Path(spec.name).name if user_path(spec.name).exists() else spec.name


def _split(
    streams: dict[str, Iterator[list[int]]], count: int
) -> tuple[list[list[int]], list[tuple[str, list[int]]]]:
    """Return sequences to calibrate on, and (kind, sequence) held out, about `count` of each."""
    chosen: list[list[int]] = []
    held_out: list[tuple[str, list[int]]] = []
    while streams and (len(chosen) < count or len(held_out) < count):
        for kind, sequences in list(streams.items()):
            taken = list(islice(sequences, _HELD_OUT))
            if not taken:
                streams.pop(kind)
            chosen += taken[: _HELD_OUT - 1]
            held_out += [(kind, sequence) for sequence in taken[_HELD_OUT - 1 :]]
    return chosen, held_out


def _in_turn(chosen: list[list[int]], spec: CalibrationSpec) -> list[list[int]]:
    """Return the requested number of sequences, spread evenly over the kinds of text."""
    if spec.name != DEFAULT:
        return chosen[: spec.sequences]
    step = _HELD_OUT - 1
    blocks = [chosen[i : i + step] for i in range(0, len(chosen), step)]
    rounds = [blocks[i : i + len(KINDS)] for i in range(0, len(blocks), len(KINDS))]
    mixed = [block[i] for kinds in rounds for i in range(step) for block in kinds if i < len(block)]
    return mixed[: spec.sequences]


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


def _sequences(
    records: Iterator[Mapping[str, Any]],
    tokenizer: Any,
    spec: CalibrationSpec,
    skipped: Counter[str],
) -> Iterator[list[int]]:
    """Yield consecutive documents, cut into sequences; the remainder at the end is dropped.

    Rows without text, chats with images, and rows that the chat template refuses are counted in
    `skipped`. Raises the first refusal if the template refuses every row.
    """
    waiting: list[int] = []
    rendered = failed = 0
    refusal: RowError | None = None  # the first one
    for record in records:
        try:
            tokens = tokens_of(record, tokenizer, spec.name)
        except RowError as exc:
            failed += 1
            refusal = refusal or exc
            if failed == _MOST_FAILED and not rendered:
                break
            tokens = None
        if tokens is None:
            skipped[spec.name] += 1
            continue
        rendered += 1
        waiting += tokens
        while len(waiting) >= spec.sequence_length:
            yield waiting[: spec.sequence_length]
            waiting = waiting[spec.sequence_length :]
    if refusal and not rendered:  # the template is at fault, not the rows
        raise refusal
