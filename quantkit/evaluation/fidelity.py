"""How close quants are to the native model, on text that none of them was made with.

Both models run a layer at a time, and the head a block of the vocabulary at a time, so a machine
that cannot hold the native model can judge its quants. What is kept of the native model is the
output of its last layer, from which its head gives every log-probability exactly.
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from scipy.special import stdtrit

from quantkit.artifacts.fidelity import Fidelity, Interval
from quantkit.artifacts.profile import CalibrationText
from quantkit.artifacts.report import REPORT_FILE, Report
from quantkit.backend import mx, on_cpu
from quantkit.calibration.text import (
    CHAT,
    DEFAULT,
    CalibrationSpec,
    load_tokenizer,
    overlaps,
    read_text,
)
from quantkit.checkpoint.source import Source, open_source, with_values
from quantkit.errors import (
    CacheWarning,
    CalibrationError,
    InputError,
    OutputError,
    SourceError,
    first_line,
)
from quantkit.progress import Progress
from quantkit.staging import source_marks, versions
from quantkit.storage.json_files import digest, load_json, write_bytes_atomically
from quantkit.storage.paths import cache_folder
from quantkit.streaming.attention import require_same_attention
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.lm_head import ChangedModel, TokenComparison, compared
from quantkit.streaming.weight_loader import Call
from quantkit.units import bits_per_weight

_RESAMPLES = 1000
_TOKENS_AT_ONCE = 4096  # through the head


@dataclass(frozen=True)
class Judged:
    """Held-out token ids (sequences, length), the text they are from, and the kind of text each
    sequence is."""

    about: CalibrationText
    tokens: np.ndarray
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What is to be compared; all that can be refused has been."""

    native: Source
    repos: tuple[tuple[str, Source], ...]
    text: Judged

    @property
    def steps(self) -> int:
        """How many steps of progress `compare` will tell of."""
        layers = self.native.inventory.layers + sum(s.inventory.layers for _, s in self.repos)
        return layers + len(self.repos)


def prepare(native: Source, repos: Sequence[str], request: CalibrationSpec) -> Comparison:
    """Open the repos and read the text. Raises InputError for a repo with another tokenizer, or one
    that was made with this very text."""
    native = with_values(native)
    require_same_attention(native.checkpoint)
    text = _judged(native, request)
    words = load_tokenizer(native.checkpoint).get_vocab()
    opened = []
    for name in repos:
        try:
            trusted = native.checkpoint.trust_remote_code
            source = with_values(open_source(name, quantized=True, trust_remote_code=trusted))
        except SourceError as exc:
            raise SourceError(exc if name in str(exc) else f"{name}: {exc}") from exc
        _require_same_tokenizer(native, words, name, source)
        _require_unseen(name, source, text)
        opened.append((name, source))
    return Comparison(native, tuple(opened), text)


def compare(comparison: Comparison, progress: Progress) -> list[Fidelity]:
    """How close each repo is to the native model. Raises SourceError for values that are not
    finite."""
    tokens = comparison.text.tokens
    native = StreamingModel(comparison.native)
    h = _native_output(native, tokens, progress)
    found = []
    for name, source in comparison.repos:
        model = StreamingModel(source)
        other = _output(model, tokens, progress)
        parts = []
        step = max(1, _TOKENS_AT_ONCE // tokens.shape[1])
        for start in range(0, len(tokens), step):
            part = slice(start, start + step)
            targets = mx.array(np.roll(tokens[part], -1, axis=1))
            parts += compared(native, h[part], [ChangedModel(other[part], model=model)], targets)
        progress(1, f"{name}: logits")
        found.append(_fidelity(name, source, comparison, parts))
    return found


def _judged(native: Source, request: CalibrationSpec) -> Judged:
    text = read_text(native.checkpoint, request)
    tokens, kinds = [text.held_out], list(text.kinds)
    if request.name != DEFAULT:  # how the model does in a dialogue is asked in any case
        chat = read_text(native.checkpoint, replace(request, name=DEFAULT))
        chosen = [kind == CHAT for kind in chat.kinds]
        tokens.append(chat.held_out[chosen])
        kinds += [CHAT] * sum(chosen)
    if not len(text.held_out):
        raise CalibrationError(
            f"{request.name}: holds less than five sequences of {request.sequence_length} tokens, "
            "of which every fifth is judged on. Give more text, or a smaller --sequence-length."
        )
    return Judged(text.about, np.concatenate(tokens), tuple(kinds))


def _require_same_tokenizer(
    native: Source, words: Mapping[str, int], name: str, source: Source
) -> None:
    rows, own = _vocabulary(native), _vocabulary(source)
    if rows != own:
        raise InputError(
            f"{name}: its head has {own} rows, the native one {rows}; what they say of the next "
            "token cannot be compared."
        )
    try:
        theirs = load_tokenizer(source.checkpoint)
    except CalibrationError as exc:
        raise CalibrationError(f"{name}: {exc}") from exc
    if words != theirs.get_vocab():
        raise InputError(
            f"{name}: has another tokenizer than {native.inventory.source.name}; what they say of "
            "the next token cannot be compared."
        )


def _vocabulary(source: Source) -> int:
    """Rows of the output head, or of the embedding where that is the head."""
    weights = source.inventory.weights
    heads = [w for role in ("lm_head", "embedding") for w in weights if w.role == role]
    return heads[0].shape[0] if heads else 0


def _require_unseen(name: str, source: Source, text: Judged) -> None:
    for calibration in _calibrations(source.checkpoint.path("")):
        if overlaps(text.tokens, calibration.sketch):
            about = f"{calibration.name}, seed {calibration.seed}"
            raise CalibrationError(
                f"{name}: was made with this text: passages to judge on are in its calibration "
                f"text ({about}). Give other text, or its own --seed and --sequence-length, which "
                "leave every fifth sequence out."
            )


def _calibrations(folder: Path) -> tuple[CalibrationText, ...]:
    """The texts that a repo of quantkit's was made with."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return ()
    return Report.from_json(load_json(path), str(path)).plan.calibration_texts


def _native_output(model: StreamingModel, tokens: np.ndarray, progress: Progress) -> mx.array:
    """The native model's last layer output, from the cache where it is known."""
    depends = {
        **source_marks(model.source),
        **versions(),
        "config": digest(dict(model.source.checkpoint.config)),
        "tokens": digest(tokens.tolist()),
        "device": "cpu" if on_cpu() else "gpu",
    }
    path = cache_folder() / "native" / f"{digest(depends)}.npy"
    if path.is_file():
        kept = _kept_output(path, (*tokens.shape, model.head_weight.shape[-1]))
        if kept is not None:
            progress(len(model.layers), "native, from the cache")
            return kept
    h = _output(model, tokens, progress)
    buffer = io.BytesIO()
    np.save(buffer, np.array(h))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(path, buffer.getvalue())
    except (OSError, OutputError) as exc:  # the next comparison takes longer, that is all
        warnings.warn(f"the native model's output is not kept: {exc}", CacheWarning, stacklevel=2)
    return h


def _kept_output(path: Path, shape: tuple[int, ...]) -> mx.array | None:
    """The array in a file of the cache; None if it is not what was put there."""
    try:
        values = np.load(io.BytesIO(path.read_bytes()))
    except (OSError, ValueError, EOFError, BadZipFile):
        return None
    good = isinstance(values, np.ndarray) and values.dtype == np.float32 and values.shape == shape
    return mx.array(values) if good and np.isfinite(values).all() and values.any() else None


def _output(model: StreamingModel, tokens: np.ndarray, progress: Progress) -> mx.array:
    name = model.source.inventory.source.name

    def seen(number: int, _call: Call, _y: mx.array) -> None:
        progress(1, f"{name}: layer {number}")

    try:
        return model.run(mx.array(tokens), seen)
    except SourceError as exc:
        raise SourceError(f"{name}: {exc}") from exc
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as exc:
        raise SourceError(f"{name}: mlx-lm cannot run it ({first_line(exc)}).") from exc


def _fidelity(
    name: str, source: Source, comparison: Comparison, parts: Sequence[TokenComparison]
) -> Fidelity:
    kl, same, native_nll, loss = (
        np.concatenate([np.array(getattr(part, field), np.float64) for part in parts])
        for field in ("kl", "same_top", "native_loss", "loss")
    )
    if not np.isfinite(kl).all():
        raise SourceError(f"{name}: its logits are not finite. Check it: quantkit verify {name}")
    kl = np.maximum(kl, 0)
    rng = np.random.default_rng(0)
    sequences = len(kl)
    chosen = rng.integers(0, sequences, (_RESAMPLES, sequences))
    worse = (loss - native_nll)[:, :-1].mean(axis=1)  # the last token's next one is not known
    tail = (0.5, 0.95, 0.999)
    drawn = np.array([np.quantile(kl[rows], tail) for rows in chosen])
    whole = [float(np.quantile(kl, q)) for q in tail]
    at = [_interval(value, drawn[:, i], sequences) for i, value in enumerate(whole)]
    inventory = source.inventory
    by_text = {}
    text = comparison.text
    for kind in dict.fromkeys(text.kinds):
        own = kl[[k == kind for k in text.kinds]].mean(axis=1)
        by_text[kind] = _mean(own, rng.integers(0, len(own), (_RESAMPLES, len(own))))
    return Fidelity(
        repo=name,
        native=comparison.native.inventory.source.name,
        text=text.about.name,
        seed=text.about.seed,
        bytes=inventory.total_bytes,
        bits_per_weight=bits_per_weight(inventory.total_bytes, inventory.parameters),
        tokens=kl.size,
        sequences=sequences,
        kl_mean=_mean(kl.mean(axis=1), chosen),
        kl_median=at[0],
        kl_p95=at[1],
        kl_p999=at[2],
        top1_agreement=_mean(same.mean(axis=1), chosen),
        perplexity_ratio=_mean(worse, chosen, np.exp),
        kl_by_text=by_text,
        quantiles=tuple(np.quantile(kl, np.linspace(0, 1, 101)).tolist()),
    )


def _mean(
    by_sequence: np.ndarray, chosen: np.ndarray, then: Callable[[Any], Any] = lambda x: x
) -> Interval:
    """The mean over sequences, resampled by the rows of `chosen`."""
    resampled = then(by_sequence[chosen].mean(axis=1))
    return _interval(float(then(by_sequence.mean())), resampled, len(by_sequence))


def _interval(value: float, resampled: np.ndarray, sequences: int) -> Interval:
    """95%, from the percentiles of the bootstrap. Of few sequences they are too narrow: widened by
    sqrt(n / (n - 1)) and Student's quantile over the normal one. None of a single sequence."""
    if sequences < 2:
        return Interval(value, None, None)
    low, high = np.quantile(resampled, (0.025, 0.975))
    wider = (sequences / (sequences - 1)) ** 0.5 * stdtrit(sequences - 1, 0.975) / 1.96
    return Interval(value, value - wider * (value - low), value + wider * (high - value))
