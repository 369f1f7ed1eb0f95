"""Make a profile: the folder with `profile.json` and `importance.safetensors`."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from quantkit.artifacts.experts import expert_counts, parse_expert_counts
from quantkit.artifacts.inventory import Weight, with_hashes
from quantkit.artifacts.sensitivity import IMPORTANCE_FILE, SensitivityProfile
from quantkit.backend import mx, on_cpu
from quantkit.calibration.calibration_set import (
    CalibrationSet,
    CalibrationSpec,
    read_calibration_set,
)
from quantkit.checkpoint.provenance import input_key, versions
from quantkit.checkpoint.pruned import require_prunable
from quantkit.checkpoint.source import Source, remembered_hashes
from quantkit.errors import InputError, SourceError, UnreadableError, in_field
from quantkit.formats.files import write_file
from quantkit.formats.tiers import TensorSpec
from quantkit.progress import Progress, Stage
from quantkit.quantizers.registry import RTN, find_quantizer
from quantkit.sensitivity.assemble import Assembly
from quantkit.sensitivity.entries import (
    DEFAULT_TIERS,
    Entry,
    candidate_entries,
    default_entries,
)
from quantkit.sensitivity.exact import measure_resumably
from quantkit.sensitivity.expert_probe import ExpertProbe
from quantkit.sensitivity.expert_shift import expert_shift_text, text_to_check, with_expert_shift
from quantkit.sensitivity.fisher import StageTable, Sweep
from quantkit.sensitivity.quantizer_losses import sampled_layers
from quantkit.sensitivity.store import load_profile
from quantkit.sensitivity.validation import ProfileValidation, validate
from quantkit.sensitivity.work import ProfileWork
from quantkit.storage.hashing import digest
from quantkit.storage.input_key import InputKey
from quantkit.storage.json_files import load_json
from quantkit.storage.output_dir import OutputDirectory, require_apart, require_free
from quantkit.storage.paths import PROFILE_FILE, plain_path
from quantkit.streaming.attention import require_same_attention
from quantkit.streaming.layer_runner import StreamingModel, has_gradients

METHODS = ("fisher", "kl")
_COMPARED_TOKENS = 4096  # enough text to compare quantizers on


@dataclass(frozen=True)
class ProfileSettings:
    """The settings of a profile, all of which it records.

    `draws` labels are drawn per token and averaged. `tiers` are measured for all weights; None
    stands for the default tiers of each role, beside which `more_tiers` are measured for all
    weights, and few bits for `routers`. `experts` are the numbers of experts to keep whose cost is
    measured, as `parse_expert_counts` reads them; None to measure none.
    """

    text: CalibrationSpec = field(default_factory=CalibrationSpec)
    tiers: tuple[str, ...] | None = None
    method: str = "fisher"
    quantizer: str = RTN
    draws: int = 3
    more_tiers: tuple[str, ...] = ()
    routers: bool = False
    experts: str | None = None

    def entries(self, weights: Iterable[Weight]) -> list[Entry]:
        """Return the entries to measure."""
        if self.tiers is not None:
            return candidate_entries(weights, self.tiers)
        return default_entries(weights, self.more_tiers, self.routers)

    @property
    def predicts_rounding(self) -> bool:
        """Whether costs are predicted by gradients, for weights that are rounded to nearest."""
        return self.method == "fisher" and self.quantizer == RTN

    @property
    def tier_names(self) -> tuple[str, ...]:
        """All tiers that are measured for some weight."""
        if self.tiers is not None:
            return self.tiers
        return tuple(dict.fromkeys((*DEFAULT_TIERS, *self.more_tiers)))


@dataclass(frozen=True)
class Profiling:
    """A profile of `source` to be made in the folder `out`, with all inputs checked.

    `existing` is the profile in `out`, to which `entries` are added. `experts` ranks experts, None
    if that is not requested, or done. `more_tokens` (sequences, length) are text to compare
    quantizers on, None to compare none; `shift_tokens` are text to measure expert-shift on, None
    for dense models, and for costs that are measured or a calibrated quantizer's.
    """

    source: Source
    out: Path
    settings: ProfileSettings
    force: bool
    calibration: CalibrationSet
    existing: SensitivityProfile | None
    entries: tuple[Entry, ...]
    experts: ExpertProbe | None = None
    more_tokens: np.ndarray | None = None
    shift_tokens: np.ndarray | None = None

    @property
    def steps(self) -> int:
        """The number of steps that `make` reports."""
        steps = self.source.inventory.layers + len(self.entries)
        return steps + (self.shift_tokens is not None)


def is_first() -> bool:
    """Return whether this process writes, among the processes that `mlx.launch` started."""
    return bool(mx.distributed.init().rank() == 0)


def prepare(source: Source, out: Path, settings: ProfileSettings, force: bool = False) -> Profiling:
    """Read the text, and check all inputs. Raises InputError.

    A profile of the same checkpoint, text and settings in `out` is kept, and only missing tiers are
    added.
    """
    out = plain_path(out)
    require_apart(out, source.checkpoint.path(""))
    if mx.distributed.init().size() > 1 and settings.method == "kl":
        raise InputError("`method` kl runs in one process. Start it without mlx.launch.")
    _require_settings(settings)
    if settings.method == "fisher" and not has_gradients(source):
        raise InputError(
            f"mlx-lm {version('mlx-lm')} cannot differentiate mixtures of experts. Install 0.32 or "
            "later (it needs Python 3.11)."
        )
    require_same_attention(source.checkpoint)
    with in_field("calibration"):
        text = read_calibration_set(source.checkpoint, settings.text)
        more_tokens = _text_to_compare(source, settings)
    existing = None
    hashed = with_hashes(source.inventory.source, remembered_hashes(source))
    source = replace(source, inventory=replace(source.inventory, source=hashed))
    if (out / PROFILE_FILE).is_file() and not force:
        existing = load_profile(str(out), source.inventory)
        _require_same(existing, _described(source, settings, text), out)
    else:
        require_free(out, force)
    present = (
        {(w.name, cost.tier) for w in existing.weights for cost in w.costs} if existing else set()
    )
    weights = source.inventory.weights
    missing = tuple(e for e in settings.entries(weights) if e.key not in present)
    experts = _expert_probe(source, settings, existing)
    shift_tokens = _text_for_expert_shift(source, settings)
    force = force or existing is not None
    return Profiling(
        source, out, settings, force, text, existing, missing, experts, more_tokens, shift_tokens
    )


def _text_to_compare(source: Source, settings: ProfileSettings) -> np.ndarray | None:
    """Return the tokens (sequences, length) to compare quantizers on, None to compare none."""
    if not settings.predicts_rounding:
        return None
    more = replace(settings.text, tokens=_compared_tokens(settings.text.tokens))
    return read_calibration_set(source.checkpoint, more).tokens


def _text_for_expert_shift(source: Source, settings: ProfileSettings) -> np.ndarray | None:
    """Return the tokens (sequences, length) to measure expert-shift on, None if that is not due."""
    if not settings.predicts_rounding or source.inventory.experts is None:
        return None
    return expert_shift_text(source.checkpoint, settings.text)


def _compared_tokens(profiled: int) -> int:
    """Return the tokens on which quantizers are compared: up to four times those of a profile."""
    return min(4 * profiled, max(profiled, _COMPARED_TOKENS))


def _expert_probe(
    source: Source, settings: ProfileSettings, existing: SensitivityProfile | None
) -> ExpertProbe | None:
    """Return what ranks experts; None if that is not requested, or if a profile has it all."""
    counts = parse_expert_counts(settings.experts, source.inventory)
    counts = tuple(count for count in counts if count != source.inventory.experts)
    if not counts:
        return None
    if settings.method != "fisher" or mx.distributed.init().size() > 1:
        raise InputError("`experts` are ranked by `method` fisher, and in one process.")
    require_prunable(source)
    before = {} if existing is None else existing.expert_rankings
    if before and all(count in ranking.kl for ranking in before.values() for count in counts):
        return None
    more = {count for ranking in before.values() for count in ranking.kl}
    wanted = sorted({*counts, *more, *expert_counts(source.inventory)}, reverse=True)
    return ExpertProbe.of(source.inventory, tuple(wanted))


def make(profiling: Profiling, progress: Progress) -> SensitivityProfile:
    """Measure, and write the folder. Raises InputError; an interrupted run can be resumed.

    Among several processes only the first one writes.
    """
    if profiling.existing is not None and not (profiling.entries or profiling.experts):
        return profiling.existing
    group, first, out = mx.distributed.init(), is_first(), profiling.out
    _require_sequences(profiling, group.size())
    if not first:
        out = out.with_name(f"{out.name}.process-{group.rank()}")
    with OutputDirectory(
        out, _input_key(profiling, group.size()), profiling.force, "profile"
    ) as output:
        if output.resumed:
            progress.note(f"resuming the interrupted profile in {output.folder}")
        stage = progress.stage("Profiling", profiling.steps, "steps")
        try:
            model = StreamingModel(profiling.source)
            output.require_space(_work_bytes(model, profiling))
            profile, importance, seconds = _measured(model, profiling, output.work, stage)
        except SourceError as exc:
            if not isinstance(exc, UnreadableError):  # what is done stays for the next run
                output.discard()
            raise
        if not first:
            output.discard()
            return profile
        output.write(PROFILE_FILE, profile.to_json())
        run = {"seconds": seconds, "entries": len(profiling.entries)}
        if not profiling.entries and (before := profiling.out / "run.json").is_file():
            run = load_json(before, InputError)  # experts were ranked, and nothing else
        output.write("run.json", run)
        _write_importance(output.repo / IMPORTANCE_FILE, importance)
        output.commit()
    return profile


def _measured(
    model: StreamingModel, profiling: Profiling, work: Path, stage: Stage
) -> tuple[SensitivityProfile, dict[str, np.ndarray], float]:
    """Return the profile, the importance of its weights, and the seconds that both took."""
    source = profiling.source
    tables, seconds = _tables(model, profiling, ProfileWork(work), stage)
    entries, existing = profiling.entries, profiling.existing
    assembly = Assembly(source.inventory.weights, entries, tables, existing)
    profile = assembly.profile(_described(source, profiling.settings, profiling.calibration))
    if profiling.shift_tokens is not None and is_first():
        started = time.monotonic()
        stage(0, "expert-shift")
        profile = with_expert_shift(model, profile, profiling.shift_tokens)
        stage(1, "expert-shift")
        seconds += time.monotonic() - started
    return profile, assembly.importance(), seconds


def _require_sequences(profiling: Profiling, processes: int) -> None:
    sequences = len(profiling.calibration.tokens)
    if processes > sequences:
        raise InputError(
            f"{processes} processes, but only {sequences} sequences to share. Raise `tokens`, or "
            "start fewer."
        )


def validate_profile(
    profiling: Profiling, profile: SensitivityProfile, count: int, progress: Stage
) -> ProfileValidation:
    """Measure `count` random entries of a finished profile on documents that it did not read.

    Raises CalibrationError.
    """
    with in_field("calibration"):
        checkpoint, spec = profiling.source.checkpoint, profiling.settings.text
        tokens = text_to_check(checkpoint, spec, profiling.shift_tokens)
    entries = profiling.settings.entries(profiling.source.inventory.weights)
    run = load_json(profiling.out / "run.json", InputError)
    seconds = run["seconds"] * len(entries) / max(1, run["entries"])
    drawn = np.random.default_rng(profile.calibration.seed).permutation(len(entries))[:count]
    return validate(
        StreamingModel(profiling.source),
        profile,
        [entries[i] for i in sorted(drawn.tolist())],
        tokens,
        lambda name: progress(1, name),
    ).extrapolated(len(entries), seconds)


def _require_settings(settings: ProfileSettings) -> None:
    if settings.method not in METHODS:
        raise InputError(f"unknown `method` {settings.method!r}. Use one of {', '.join(METHODS)}.")
    calibrated = find_quantizer(settings.quantizer).calibrated
    if calibrated and settings.method != "fisher":
        raise InputError("`method` kl rounds to nearest. Leave out `quantizer`.")
    if calibrated and mx.distributed.init().size() > 1:
        raise InputError(
            "`quantizer` search and gptq run in one process: each process sees only its own text."
        )
    if settings.draws < 1:
        raise InputError("`draws` must be 1 or more.")


def _described(
    source: Source, settings: ProfileSettings, text: CalibrationSet
) -> SensitivityProfile:
    """Return the profile without its table."""
    return SensitivityProfile(
        source=source.inventory.source,
        model_type=source.inventory.model_type,
        method=settings.method,
        quantizer=settings.quantizer,
        draws=settings.draws,
        tiers=settings.tier_names,
        calibration=text.text,
        weights=(),
        versions=versions(),
    )


def _identity(profile: SensitivityProfile) -> dict[str, object]:
    """Return the settings that two profiles must share to be merged, by name."""
    return {
        "method": profile.method,
        "quantizer": profile.quantizer,
        "number of draws": profile.draws,
        "calibration text": asdict(profile.calibration),
        "set of versions": dict(profile.versions),
    }


def _require_same(existing: SensitivityProfile, wanted: SensitivityProfile, out: Path) -> None:
    before, now = _identity(existing), _identity(wanted)
    for setting, value in now.items():
        if before[setting] != value:
            raise InputError(
                f"{out}: holds a profile with another {setting}. Use it as it is with "
                "`profile`, choose another folder, or replace it with `force`."
            )


def _input_key(profiling: Profiling, processes: int) -> InputKey:
    described = _described(profiling.source, profiling.settings, profiling.calibration)
    hashes = {
        **{setting: digest(value) for setting, value in _identity(described).items()},
        "set of tiers": digest([entry.key for entry in profiling.entries]),
        "numbers of experts": digest(profiling.experts.counts if profiling.experts else ()),
        "number of processes": str(processes),
        "device": "cpu" if on_cpu() else "gpu",
    }
    return input_key(profiling.source, hashes)


def _work_bytes(model: StreamingModel, profiling: Profiling) -> int:
    """Return the disk space for every layer's input, and the gradients at its output, in
    float32.
    """
    if profiling.settings.method != "fisher":
        return 0
    layers, width = len(model.layers), model.head_weight.shape[-1]
    streams = profiling.calibration.tokens.size * (layers + 1) * (1 + profiling.settings.draws)
    if profiling.more_tokens is not None:  # inputs of the sampled layers and of the head
        streams += profiling.more_tokens.size * (len(sampled_layers(layers)) + 1)
    return 4 * width * streams


def _tables(
    model: StreamingModel, profiling: Profiling, work: ProfileWork, progress: Stage
) -> tuple[list[StageTable], float]:
    settings, tokens = profiling.settings, profiling.calibration.tokens
    if settings.method == "fisher":
        seed = settings.text.seed
        quantizer, experts = settings.quantizer, profiling.experts
        sweep = Sweep(
            model,
            tokens,
            profiling.entries,
            work,
            settings.draws,
            seed,
            quantizer,
            experts,
            profiling.more_tokens,
        )
        tables = sweep.run(progress)
        return tables, sweep.seconds()
    costs, seconds = measure_resumably(
        model, mx.array(tokens), profiling.entries, work, lambda name: progress(1, name)
    )
    return [StageTable(costs)], seconds


def _write_importance(path: Path, importance: Mapping[str, np.ndarray]) -> None:
    write_file(path, [(TensorSpec(name, "F32", v.shape), v) for name, v in importance.items()])
