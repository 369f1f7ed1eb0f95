"""Making a profile: the folder `profile.json` and `importance.safetensors` stand in."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from quantkit.artifacts.inventory import with_hashes
from quantkit.artifacts.profile import (
    IMPORTANCE_FILE,
    PROFILE_FILE,
    SensitivityProfile,
    TierCost,
    WeightSensitivity,
)
from quantkit.backend import mx, on_cpu
from quantkit.calibration.text import CalibrationSpec, Text, read_text
from quantkit.checkpoint.source import Source, file_hashes
from quantkit.errors import CalibrationError, InputError, SourceError
from quantkit.formats.files import write_file
from quantkit.formats.tiers import QUANTIZERS, TensorSpec
from quantkit.progress import Progress
from quantkit.sensitivity.entries import DEFAULT_TIERS, Entry, candidates, native_cost
from quantkit.sensitivity.exact import measured_in_steps
from quantkit.sensitivity.fisher import Sweep, Table
from quantkit.sensitivity.store import load_profile
from quantkit.sensitivity.validation import Check, check
from quantkit.sensitivity.work import ProfileWork
from quantkit.staging import OutputDirectory, require_apart, require_free, source_marks, versions
from quantkit.storage.json_files import digest, load_json
from quantkit.storage.paths import plain_path
from quantkit.streaming.attention import require_same_attention
from quantkit.streaming.layer_runner import StreamingModel, has_gradients

METHODS = ("fisher", "kl")


@dataclass(frozen=True)
class Settings:
    """How to profile: the text, the tiers, and the method, all of which the profile records.

    `draws` labels are drawn per token and averaged.
    """

    text: CalibrationSpec = field(default_factory=CalibrationSpec)
    tiers: tuple[str, ...] = DEFAULT_TIERS
    method: str = "fisher"
    rounding: str = "rtn"
    draws: int = 2


@dataclass(frozen=True)
class Profiling:
    """A profile of `source` to be made in the folder `out`; all that can be refused has been."""

    source: Source
    out: Path
    settings: Settings
    force: bool
    text: Text
    known: SensitivityProfile | None
    entries: tuple[Entry, ...]

    @property
    def steps(self) -> int:
        """How many steps of progress `make` will tell of."""
        return self.source.inventory.layers + len(self.entries)


def is_first() -> bool:
    """Whether this process is the one that writes, of those that `mlx.launch` started."""
    return bool(mx.distributed.init().rank() == 0)


def prepare(source: Source, out: Path, settings: Settings, force: bool = False) -> Profiling:
    """Read the text, and look what is there already. Raises InputError.

    A profile of the same checkpoint, text and settings in `out` is kept, and only the tiers that it
    lacks are added.
    """
    out = plain_path(out)
    require_apart(out, source.checkpoint.path(""))
    if mx.distributed.init().size() > 1 and settings.method == "kl":
        raise InputError("--method kl runs in one process. Start it without mlx.launch.")
    _require_settings(settings)
    if settings.method == "fisher" and not has_gradients(source):
        raise InputError(
            f"mlx-lm {version('mlx-lm')} cannot differentiate mixtures of experts. Install 0.32 or "
            "later (it needs Python 3.11)."
        )
    require_same_attention(source.checkpoint)
    text = read_text(source.checkpoint, settings.text)
    known = None
    hashed = with_hashes(source.inventory.source, file_hashes(source))
    source = replace(source, inventory=replace(source.inventory, source=hashed))
    if (out / PROFILE_FILE).is_file() and not force:
        known = load_profile(str(out), source.inventory)
        _require_same(known, _described(source, settings, text), out)
    else:
        require_free(out, force)
    held = {(w.name, loss.tier) for w in known.weights for loss in w.losses} if known else set()
    weights = source.inventory.weights
    missing = [e for e in candidates(weights, settings.tiers) if e.key not in held]
    return Profiling(source, out, settings, force or known is not None, text, known, tuple(missing))


def make(profiling: Profiling, progress: Progress) -> SensitivityProfile:
    """Measure, and write the folder. Raises InputError; what was measured is then kept for the next
    run. Where several processes take part, only the first one writes."""
    if profiling.known is not None and not profiling.entries:
        progress(profiling.steps, "all measured already")
        return profiling.known
    group = mx.distributed.init()
    if group.size() > len(profiling.text.tokens):
        raise InputError(
            f"{group.size()} processes, but only {len(profiling.text.tokens)} sequences to share. "
            "Raise --tokens, or start fewer."
        )
    first, out = is_first(), profiling.out
    if not first:
        out = out.with_name(f"{out.name}.process-{group.rank()}")
    with OutputDirectory(
        out, _depends(profiling, group.size()), profiling.force, "profile"
    ) as staging:
        try:
            model = StreamingModel(profiling.source)
            staging.require_space(_work_bytes(model, profiling))
            tables, seconds = _tables(model, profiling, ProfileWork(staging.work), progress)
        except SourceError:
            staging.discard()
            raise
        profile = _assembled(profiling, tables)
        if not first:
            staging.discard()
            return profile
        staging.write(PROFILE_FILE, profile.to_json())
        staging.write("run.json", {"seconds": seconds, "entries": len(profiling.entries)})
        _write_importance(staging.repo / IMPORTANCE_FILE, _importance(profiling, tables))
        staging.commit()
    return profile


def make_check(
    profiling: Profiling, profile: SensitivityProfile, count: int, progress: Progress
) -> Check:
    """Measure `count` entries of a finished profile on text that it has not seen."""
    if not len(profiling.text.held_out):
        raise CalibrationError(
            f"{profiling.text.about.name}: no text is left to check on. Give more text, or fewer "
            "--tokens."
        )
    entries = candidates(profiling.source.inventory.weights, profiling.settings.tiers)
    run = load_json(profiling.out / "run.json", InputError)
    seconds = run["seconds"] * len(entries) / max(1, run["entries"])
    return check(
        StreamingModel(profiling.source),
        profile,
        entries,
        profiling.text.held_out,
        count,
        seconds,
        lambda name: progress(1, name),
    )


def _require_settings(settings: Settings) -> None:
    if settings.method not in METHODS:
        raise InputError(f"there is no method {settings.method!r}. Methods: {', '.join(METHODS)}.")
    if settings.rounding not in QUANTIZERS:
        known = ", ".join(QUANTIZERS)
        raise InputError(f"there is no rounding {settings.rounding!r}. Roundings: {known}.")
    if settings.rounding != "rtn" and settings.method != "fisher":
        raise InputError("--method kl rounds to nearest. Leave --rounding out.")
    if settings.rounding != "rtn" and mx.distributed.init().size() > 1:
        raise InputError("--rounding search and gptq run in one process: each sees only its text.")
    if settings.draws < 1:
        raise InputError("--draws is 1 or more.")


def _described(source: Source, settings: Settings, text: Text) -> SensitivityProfile:
    """The profile to be, without its table."""
    return SensitivityProfile(
        source=source.inventory.source,
        model_type=source.inventory.model_type,
        method=settings.method,
        rounding=settings.rounding,
        draws=settings.draws,
        tiers=settings.tiers,
        calibration=text.about,
        weights=(),
        versions=versions(),
    )


def _identity(profile: SensitivityProfile) -> dict[str, object]:
    """What two profiles must have in common to share a table, under names a person understands."""
    return {
        "method": profile.method,
        "rounding": profile.rounding,
        "number of draws": profile.draws,
        "calibration text": asdict(profile.calibration),
        "set of versions": dict(profile.versions),
    }


def _require_same(known: SensitivityProfile, wanted: SensitivityProfile, out: Path) -> None:
    before, now = _identity(known), _identity(wanted)
    for what, value in now.items():
        if before[what] != value:
            raise InputError(
                f"{out}: holds a profile with another {what}. Choose another folder, or replace it "
                "with --force."
            )


def _depends(profiling: Profiling, processes: int) -> dict[str, str]:
    source = profiling.source
    described = _described(source, profiling.settings, profiling.text)
    return {
        **source_marks(source),
        **{what: digest(value) for what, value in _identity(described).items()},
        "set of tiers": digest([entry.key for entry in profiling.entries]),
        "number of processes": str(processes),
        "device": "cpu" if on_cpu() else "gpu",
    }


def _work_bytes(model: StreamingModel, profiling: Profiling) -> int:
    """What waits on disk: every layer's input, and the gradients behind it, in float32."""
    stream = 4 * profiling.text.tokens.size * model.head_weight.shape[-1]
    fisher = profiling.settings.method == "fisher"
    return stream * (len(model.layers) + 1) * (1 + profiling.settings.draws) if fisher else 0


def _tables(
    model: StreamingModel, profiling: Profiling, work: ProfileWork, progress: Progress
) -> tuple[list[Table], float]:
    settings, tokens = profiling.settings, profiling.text.tokens
    if settings.method == "fisher":
        sweep = Sweep(
            model,
            tokens,
            profiling.entries,
            settings.draws,
            settings.text.seed,
            work,
            settings.rounding,
        )
        tables = sweep.run(progress)
        return tables, sweep.seconds()
    losses, seconds = measured_in_steps(
        model, mx.array(tokens), profiling.entries, work, lambda name: progress(1, name)
    )
    return [Table(losses, {}, {})], seconds


def _assembled(profiling: Profiling, tables: Sequence[Table]) -> SensitivityProfile:
    losses: dict[str, dict[str, TierCost]] = {}
    known = profiling.known
    if known is not None:
        losses = {weight.name: dict(weight.by_tier) for weight in known.weights}
    seen = {name: counts for table in tables for name, counts in table.seen.items()}
    values = {key: loss for table in tables for key, loss in table.losses.items()}
    for entry in profiling.entries:
        # A tied embedding changes both ends of the model; each table has its own part of that.
        parts = [table.losses[entry.key] for table in tables if entry.key in table.losses]
        values[entry.key] = np.sum(parts, axis=0)
        loss = _loss(entry, values[entry.key], _unseen(seen.get(entry.weight.name)))
        losses.setdefault(entry.weight.name, {})[entry.tier.name] = loss
    described = _described(profiling.source, profiling.settings, profiling.text)
    old = {w.name: w.unseen_experts for w in known.weights} if known else {}
    weights = []
    for weight in profiling.source.inventory.weights:
        native = native_cost(weight)
        rows = {native.tier: native, **losses.get(weight.name, {})}
        ordered = sorted(rows.values(), key=lambda loss: (-loss.bytes, loss.tier))
        unseen = _unseen(seen.get(weight.name))[0] if weight.name in seen else old.get(weight.name)
        weights.append(
            WeightSensitivity(
                weight.name,
                weight.role,
                weight.layer,
                weight.storage,
                weight.parameters,
                unseen or 0,
                tuple(ordered),
            )
        )
    counts = {
        name: tuple(int(n) for n in number) for name, number in seen.items() if len(number) > 1
    }
    tiers = described.tiers if known is None else (*known.tiers, *described.tiers)
    return replace(
        described,
        tiers=tuple(dict.fromkeys(tiers)),
        weights=tuple(weights),
        expert_tokens=counts or (known.expert_tokens if known else {}),
    )


def _unseen(seen: np.ndarray | None) -> tuple[int, int]:
    """(experts that saw no token, inputs of all together)"""
    if seen is None or len(seen) == 1:
        return 0, 1
    return int((seen == 0).sum()), int(seen.sum())


def _loss(entry: Entry, values: np.ndarray, unseen: tuple[int, int]) -> TierCost:
    """Mean and standard error over sequences. Each unseen expert counts as if it had been given one
    input, at the loss that an input to this stack has on average."""
    if not np.isfinite(values).all():
        raise SourceError(f"{entry.weight.name}: its loss in {entry.tier} is not finite.")
    more = 1 + unseen[0] / max(1, unseen[1])
    kl = float(values.mean(dtype=np.float64)) * more
    spread = values.std(ddof=1, dtype=np.float64) if len(values) > 1 else abs(kl)
    return TierCost(entry.tier.name, entry.bytes, max(0.0, kl), float(spread) / len(values) ** 0.5)


def _importance(profiling: Profiling, tables: Sequence[Table]) -> dict[str, np.ndarray]:
    """Mean squared input per channel of every weight (experts, in); an expert that saw no token has
    the mean of those that did."""
    found = {}
    for table in tables:
        for name, total in table.importance.items():
            count = table.seen[name].reshape(-1, 1)
            pooled = total.sum(axis=0) / max(1.0, float(count.sum()))
            mean = np.where(count > 0, total / np.maximum(count, 1), pooled)
            found[name] = mean.astype(np.float32)
    order = [weight.name for weight in profiling.source.inventory.weights]
    return {name: found[name] for name in order if name in found}


def _write_importance(path: Path, importance: Mapping[str, np.ndarray]) -> None:
    write_file(path, [(TensorSpec(name, "F32", v.shape), v) for name, v in importance.items()])
