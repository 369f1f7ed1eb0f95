"""Fidelity: how close quants are to the native model, on held-out text.

Both models run a layer at a time, and the head a block of the vocabulary at a time, so that a
machine too small for the native model can evaluate its quants. The output of the native model's
last layer is cached; its head turns that into exact log-probabilities.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from quantkit.artifacts.calibration import CalibrationText
from quantkit.artifacts.fidelity import Fidelity
from quantkit.artifacts.report import Report
from quantkit.backend import mx, on_cpu
from quantkit.backend.memory_limits import memory_limits
from quantkit.calibration.calibration_set import (
    CalibrationSpec,
    load_tokenizer,
    read_calibration_set,
)
from quantkit.calibration.documents import CHAT, DEFAULT
from quantkit.calibration.fingerprint import overlaps
from quantkit.calibration.splits import EVALUATE
from quantkit.checkpoint.provenance import input_key
from quantkit.checkpoint.source import Source, open_source, with_values
from quantkit.errors import (
    CacheWarning,
    CalibrationError,
    InputError,
    OutputError,
    SourceError,
    first_line,
    in_field,
)
from quantkit.evaluation.intervals import DocumentBootstrap
from quantkit.progress import Stage
from quantkit.storage.hashing import digest
from quantkit.storage.json_files import load_json, write_bytes_atomically
from quantkit.storage.paths import REPORT_FILE, cache_folder
from quantkit.streaming.attention import require_same_attention
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.lm_head import ChangedModel, TokenComparison, compared
from quantkit.streaming.weight_loader import Call
from quantkit.units import bits_per_weight

_TAIL = (0.5, 0.95, 0.999)  # quantiles of the KL divergence


@dataclass(frozen=True)
class EvaluationText:
    """Token ids to evaluate on (sequences, length), and where they come from.

    `documents` (sequences, length) numbers the document of every token, `kinds` names the kind of
    text of each sequence.
    """

    text: CalibrationText
    tokens: np.ndarray
    documents: np.ndarray
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Models to compare, with all inputs checked."""

    native: Source
    repos: tuple[tuple[str, Source], ...]
    text: EvaluationText

    @property
    def steps(self) -> int:
        """The number of steps that `compare` reports."""
        layers = self.native.inventory.layers + sum(s.inventory.layers for _, s in self.repos)
        return layers + len(self.repos)


def prepare(native: Source, repos: Sequence[str], spec: CalibrationSpec) -> Comparison:
    """Open the repos and read the text.

    Raises InputError for a repo with another tokenizer, or one that was calibrated on this text.
    """
    native = with_values(native)
    require_same_attention(native.checkpoint)
    with in_field("text"):
        text = _evaluation_text(native, spec)
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


def compare(comparison: Comparison, progress: Stage) -> list[Fidelity]:
    """Measure the fidelity of each repo. Raises SourceError for values that are not finite."""
    tokens = comparison.text.tokens
    native = StreamingModel(comparison.native)
    h = _native_output(native, tokens, progress)
    results = []
    for name, source in comparison.repos:
        model = StreamingModel(source)
        other = _output(model, tokens, progress)
        batches = []
        step = max(1, memory_limits().tokens // tokens.shape[1])
        for start in range(0, len(tokens), step):
            some = slice(start, start + step)
            targets = mx.array(np.roll(tokens[some], -1, axis=1))
            batches += compared(native, h[some], [ChangedModel(other[some], model=model)], targets)
        progress(1, f"{name}: logits")
        results.append(_fidelity(name, source, comparison, batches))
    return results


def _evaluation_text(native: Source, spec: CalibrationSpec) -> EvaluationText:
    text = read_calibration_set(native.checkpoint, spec, EVALUATE)
    tokens, documents, kinds = text.tokens, text.documents, text.kinds
    if spec.name != DEFAULT:  # dialogues are always evaluated
        shipped = read_calibration_set(native.checkpoint, replace(spec, name=DEFAULT), EVALUATE)
        chosen = np.array([kind == CHAT for kind in shipped.kinds])
        tokens = np.concatenate([tokens, shipped.tokens[chosen]])
        more = shipped.documents[chosen] + text.text.documents
        documents = np.concatenate([documents, more])
        kinds += (CHAT,) * int(chosen.sum())
    return EvaluationText(text.text, tokens, documents, kinds)


def _require_same_tokenizer(
    native: Source, words: Mapping[str, int], name: str, source: Source
) -> None:
    rows, other = _vocabulary(native), _vocabulary(source)
    if rows != other:
        raise InputError(
            f"{name}: its head has {other} rows, the native one {rows}; their predictions "
            "cannot be compared."
        )
    try:
        theirs = load_tokenizer(source.checkpoint)
    except CalibrationError as exc:
        raise CalibrationError(f"{name}: {exc}") from exc
    if words != theirs.get_vocab():
        raise InputError(
            f"{name}: its tokenizer differs from {native.inventory.source.name}'s; their "
            "predictions cannot be compared."
        )


def _vocabulary(source: Source) -> int:
    """Return the rows of the output head, which may be the embedding."""
    weights = source.inventory.weights
    heads = [w for role in ("lm_head", "embedding") for w in weights if w.role == role]
    return heads[0].shape[0] if heads else 0


def _require_unseen(name: str, source: Source, text: EvaluationText) -> None:
    for calibration in _calibration_texts(source.checkpoint.path("")):
        if overlaps(text.tokens, calibration.sketch):
            label = f"{calibration.name}, seed {calibration.seed}"
            raise CalibrationError(
                f"{name}: was made with this text: its calibration text ({label}) contains "
                "passages to evaluate on. Give other text, or its `seed`: documents to evaluate on "
                "are not calibrated on."
            )


def _calibration_texts(folder: Path) -> tuple[CalibrationText, ...]:
    """Return the texts that a repo of quantkit was made with."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return ()
    return Report.from_json(load_json(path), str(path)).plan.calibration_texts


def _native_output(model: StreamingModel, tokens: np.ndarray, progress: Stage) -> mx.array:
    """Return the native model's last layer output, from the cache if possible."""
    hashes = {
        "config": digest(dict(model.source.checkpoint.config)),
        "tokens": digest(tokens.tolist()),
        "device": "cpu" if on_cpu() else "gpu",
    }
    key = input_key(model.source, hashes)
    path = cache_folder() / "native" / f"{digest(dict(key.hashes))}.npy"
    if path.is_file():
        cached = _cached_output(path, (*tokens.shape, model.head_weight.shape[-1]))
        if cached is not None:
            progress(len(model.layers), "native, from the cache")
            return cached
    h = _output(model, tokens, progress)
    buffer = io.BytesIO()
    np.save(buffer, np.array(h))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(path, buffer.getvalue())
    except (OSError, OutputError) as exc:  # the next comparison only takes longer
        warnings.warn(f"the native model's output is not cached: {exc}", CacheWarning, stacklevel=2)
    return h


def _cached_output(path: Path, shape: tuple[int, ...]) -> mx.array | None:
    """Return the array in a file of the cache, None if it is damaged."""
    try:
        values = np.load(io.BytesIO(path.read_bytes()))
    except (OSError, ValueError, EOFError, BadZipFile):
        return None
    valid = isinstance(values, np.ndarray) and values.dtype == np.float32 and values.shape == shape
    return mx.array(values) if valid and np.isfinite(values).all() and values.any() else None


def _output(model: StreamingModel, tokens: np.ndarray, progress: Stage) -> mx.array:
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
    name: str, source: Source, comparison: Comparison, batches: Sequence[TokenComparison]
) -> Fidelity:
    kl, same, native_nll, nll = (
        np.concatenate([np.array(getattr(batch, field), np.float64) for batch in batches])
        for field in ("kl", "same_top", "native_nll", "nll")
    )
    _require_finite(name, kl)
    kl = np.maximum(kl, 0)
    text, inventory, native = comparison.text, source.inventory, comparison.native.inventory
    growth = nll - native_nll
    growth[:, -1] = np.nan  # the last token has no target
    rng = np.random.default_rng(0)
    drawn = DocumentBootstrap.draw(rng, text.documents)
    median, p95, p999 = drawn.quantiles(kl.reshape(-1), _TAIL)
    by_text = {}
    for kind in dict.fromkeys(text.kinds):
        of_kind = [k == kind for k in text.kinds]
        in_kind = DocumentBootstrap.draw(rng, text.documents[of_kind])
        by_text[kind] = in_kind.mean(kl[of_kind].reshape(-1))
    return Fidelity(
        repo=name,
        native=native.source.name,
        text=text.text.name,
        seed=text.text.seed,
        bytes=inventory.total_bytes,
        bits_per_weight=bits_per_weight(inventory.total_bytes, native.parameters),
        tokens=kl.size,
        sequences=len(kl),
        documents=drawn.count,
        kl_mean=drawn.mean(kl.reshape(-1)),
        kl_median=median,
        kl_p95=p95,
        kl_p999=p999,
        top1_agreement=drawn.mean(same.reshape(-1), most=1.0),
        perplexity_ratio=drawn.mean(growth.reshape(-1), np.exp),
        kl_by_text=by_text,
        quantiles=tuple(np.quantile(kl, np.linspace(0, 1, 101)).tolist()),
    )


def _require_finite(name: str, kl: np.ndarray) -> None:
    if not np.isfinite(kl).all():
        raise SourceError(f"{name}: its logits are not finite. Check it: quantkit verify {name}")
