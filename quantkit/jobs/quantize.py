"""Quantize: from a checkpoint and a request for tiers to a repo with its report and card."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.artifacts.calibration import ExpertInputs
from quantkit.artifacts.memory import MemoryTarget
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.report import Report, SizePoint
from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.calibration.calibration_set import (
    CalibrationSet,
    CalibrationSpec,
    load_tokenizer,
    read_calibration_set,
)
from quantkit.calibration.splits import CALIBRATE, VALIDATE
from quantkit.checkpoint.hub import is_repo_id
from quantkit.checkpoint.provenance import versions
from quantkit.checkpoint.pruned import pruned_source
from quantkit.checkpoint.source import Source, with_values
from quantkit.errors import (
    CalibrationError,
    InputError,
    PlanError,
    UntrustedCodeError,
    in_field,
)
from quantkit.jobs.open_model import open_model
from quantkit.jobs.planning import PlanRequest, choose_plan
from quantkit.jobs.profile import note_skipped_rows, prepare_profile, run_profiling
from quantkit.jobs.quantize_options import (
    QuantizeOptions,
    check_request,
    require_imatrix_alone,
    require_text_read,
    require_tunable,
)
from quantkit.planning.allocator import plan_by_budget
from quantkit.planning.frontier import frontier as plans_by_size
from quantkit.planning.frontier import recipe_plans
from quantkit.planning.mac_memory import memory_needed
from quantkit.progress import Progress
from quantkit.publish.card import license_of
from quantkit.publish.record import documents, read_report, record
from quantkit.quantizers.calibrated import CalibratedQuantization, QuantizerText
from quantkit.quantizers.imatrix import ImatrixQuantization, load_imatrix
from quantkit.quantizers.layerwise import changed_tiers
from quantkit.quantizers.registry import SEARCH, find_quantizer
from quantkit.quantizers.scale_tuning import Tuning, TuningText
from quantkit.sensitivity.entries import size_table
from quantkit.sensitivity.measure import ProfileSettings
from quantkit.sensitivity.store import load_profile
from quantkit.storage.hashing import digest
from quantkit.storage.output_dir import require_apart, require_free
from quantkit.storage.paths import REPORT_FILE, plain_path
from quantkit.streaming.attention import attention_settings, require_same_attention
from quantkit.streaming.layer_runner import StreamingModel, has_gradients
from quantkit.writer.config import companions
from quantkit.writer.writer import Rewrite, Written, rewrite

LEAST_QUANTIZER_TOKENS = 16384
_INPUTS_PER_WIDTH = 4  # inputs of an expert to aim at, over their width
_FED = 1.0  # the same, below which gptq gains much from more text
_CALIBRATE_PER_VALIDATE = 4  # sequences for the quantizer, for each that validates its choices
_CALIBRATE_PER_TUNED = 8  # the same, for each that validates scale tuning
_POINTS = 12  # of the frontier in the card


@dataclass(frozen=True)
class QuantizeOutcome:
    """The report of the repo; `complete` if it existed already, `resumed` if a run was resumed."""

    report: Report
    complete: bool = False
    resumed: bool = False


def quantize(
    source: Source | str,
    out: Path | str,
    request: PlanRequest,
    options: QuantizeOptions | None = None,
    *,
    progress: Progress | None = None,
) -> QuantizeOutcome:
    """Quantize a checkpoint to the repo `out`, as `quantkit quantize` does.

    `source` is a source, a folder or a Hub id. A budget without a profile uses the one in
    OUT-profile, which is made first if it is missing. Raises InputError and its subclasses.
    """
    options, progress = options or QuantizeOptions(), progress or Progress()
    out = Path(out)
    check_request(out, request, options)
    if options.imatrix and request.quantizer is None:
        request = replace(request, quantizer=SEARCH)
    source = open_model(source) if isinstance(source, str) else source
    _require_output(source, out, options.force)
    profile = _profile_for(source, out, request, options, progress)
    planned = choose_plan(source, request, profile, progress)
    plan, frontier = planned.plan, _frontier(source, request, planned.profile)
    if request.plan is not None and options.imatrix is None:
        require_text_read(plan.quantizer, options)
    if options.tuning_steps:
        plan = replace(plan, tuning_steps=options.tuning_steps)
    return write_plan(source, plan, out, options, frontier=frontier, progress=progress)


def _frontier(
    source: Source, request: PlanRequest, profile: SensitivityProfile | None
) -> tuple[SizePoint, ...]:
    """Return the best plans by size, and the recipes beside them; none without a profile."""
    if profile is None or request.budget is None:
        return ()
    inventory, constraints = source.inventory, request.constraints(source)
    try:
        best = plans_by_size(inventory, profile, constraints, request.active_limit, points=_POINTS)
    except PlanError:  # a picture is no reason to refuse a plan
        return ()
    points = [SizePoint(None, plan.total_bytes, plan.predicted_kl or 0.0) for plan in best]
    for plan in recipe_plans(inventory, profile):
        if plan.predicted_kl is not None:
            name = plan.origin.removeprefix("recipe ")
            points.append(SizePoint(name, plan.total_bytes, plan.predicted_kl))
    return tuple(points)


def _require_output(source: Source, out: Path, force: bool) -> None:
    require_apart(out, source.checkpoint.folder)
    if not (out / REPORT_FILE).exists():
        require_free(out, force)


def _profile_for(
    source: Source, out: Path, request: PlanRequest, options: QuantizeOptions, progress: Progress
) -> SensitivityProfile | None:
    """Return the named profile, or for a budget the one in OUT-profile, made if it is missing."""
    if request.profile is not None:
        with in_field("profile"):
            return load_profile(request.profile, source.inventory)
    if request.budget is None:
        return None
    constraints, budget = request.constraints(source), request.parsed_budget(source)
    named = [*(constraints.tiers or ()), *(tier for _, tier in constraints.pins)]
    settings = ProfileSettings(
        options.profile_text,
        more_tiers=tuple(tier.name for tier in named if tier.quantized),
        routers=constraints.routers,
        experts=request.experts,
    )
    # Sizes need no measurement: refuse an impossible budget before hours of work.
    entries = settings.entries(source.inventory.weights)
    sizes = size_table(source.inventory, entries, settings.tier_names)
    plan_by_budget(source.inventory, sizes, budget, constraints)
    folder = out.with_name(f"{out.name}-profile")
    try:
        profiling = prepare_profile(source, folder, settings)
    except InputError:
        if not options.force:
            raise
        profiling = prepare_profile(source, folder, settings, force=True)
    return run_profiling(profiling, progress)


def write_plan(
    source: Source,
    plan: Plan,
    out: Path,
    options: QuantizeOptions | None = None,
    *,
    frontier: tuple[SizePoint, ...] = (),
    progress: Progress | None = None,
) -> QuantizeOutcome:
    """Write the repo of `plan`, its report and card included, which show the `frontier`.

    A source on the Hub is downloaded first. Raises the errors of `rewrite`, InputError,
    CalibrationError and HubError.
    """
    options, progress = options or QuantizeOptions(), progress or Progress()
    require_same_attention(source.checkpoint)
    if options.base_model is not None and not is_repo_id(options.base_model):
        raise InputError(f"`base_model` {options.base_model!r}: write a Hub id like user/name.")
    if source.checkpoint.folder is None:
        _require_output(source, plain_path(out), options.force)  # before the download
        source = with_values(source)
    if plan.pruning is not None:
        source = pruned_source(source, plan.pruning.kept)
    companions(source.checkpoint.path(""), source.inventory)  # refuses missing files
    require_tunable(plan.tuning_steps, plan.quantizer)
    plan, quantization, hashes = _quantization(source, plan, options, progress)
    draft = replace(_draft(source, plan, options), frontier=frontier)

    def describe(written: Written) -> Mapping[str, str | bytes]:
        inputs = quantization.expert_inputs(written.work) if quantization else {}
        if options.imatrix is None:
            _note_starved(inputs, progress)
        return documents(_report(draft, written, inputs))

    job = Rewrite(source, plan, out, quantization, hashes, options.shard_bytes, options.force)
    outcome = rewrite(job, describe, progress)
    if draft.base_model is not None and read_report(out).base_model != draft.base_model:
        record(out, base_model=draft.base_model)  # a complete repo under another name
    return QuantizeOutcome(read_report(out), outcome.complete, outcome.resumed)


def _report(draft: Report, written: Written, inputs: Mapping[str, ExpertInputs]) -> Report:
    """Return the report with the written files."""
    return replace(
        draft,
        plan=replace(draft.plan, source=written.source),
        shards=written.shards,
        files=written.files,
        expert_inputs=inputs,
    )


def _draft(source: Source, plan: Plan, options: QuantizeOptions) -> Report:
    """Return the report without the written files."""
    name = source.checkpoint.name
    base_model = options.base_model
    if base_model is None and is_repo_id(name):  # the name of a local folder has no slash
        base_model = name
    target = plan.memory_target or MemoryTarget()
    return Report(
        plan=plan,
        shards=(),
        files=(),
        versions=versions(),
        source_config=attention_settings(source.checkpoint.stated_config),
        base_model=base_model,
        license=license_of(source.checkpoint.path("")),
        command=options.command,
        memory=memory_needed(plan.total_bytes, source.checkpoint.settings, target),
    )


def _require_tokenizer(source: Source) -> None:
    """Check that stock mlx-lm reads the tokenizer, before the work. Raises CalibrationError.

    Untrusted code is left to the users of the repo. The tokenizers library refuses folders whose
    name is not text.
    """
    if str(source.checkpoint.path("")).isprintable():
        with suppress(UntrustedCodeError):
            load_tokenizer(source.checkpoint)


def _quantization(
    source: Source, plan: Plan, options: QuantizeOptions, progress: Progress
) -> tuple[Plan, CalibratedQuantization | ImatrixQuantization | None, dict[str, str]]:
    """Return the plan with its calibration text, the quantization, and the hashes of its inputs.

    Rounding to nearest has no text and no quantization.
    """
    if options.imatrix is not None:
        require_imatrix_alone(plan.quantizer, options)
        return _by_imatrix(source, plan, options.imatrix)
    if find_quantizer(plan.quantizer).calibrated:
        return _calibrated(source, plan, options, progress)
    _require_tokenizer(source)
    return plan, None, {}


def _calibrated(
    source: Source, plan: Plan, options: QuantizeOptions, progress: Progress
) -> tuple[Plan, CalibratedQuantization, dict[str, str]]:
    """Return the same for a calibrated quantizer."""
    if plan.tuning_steps and not has_gradients(source):
        raise InputError(
            "`tuning_steps`: a mixture of experts needs mlx-lm 0.32 (and so Python 3.11)."
        )
    quantizer_tokens = options.quantizer_tokens
    if quantizer_tokens is None:
        quantizer_tokens = needed_tokens(source, plan)
    spec = replace(options.quantizer_text, tokens=quantizer_tokens)
    count = spec.sequences
    tuned = Tuning(plan.tuning_steps).all_tokens  # new text for every step
    calibration = _read(source, replace(spec, tokens=max(spec.tokens, tuned)), CALIBRATE)
    validated = max(1, min(count, len(calibration.tokens)) // _CALIBRATE_PER_VALIDATE)
    spec = replace(spec, tokens=validated * spec.sequence_length)
    validation = _read(source, spec, VALIDATE)
    tokens, text = calibration.tokens, calibration.text
    note_skipped_rows(text.name, text.skipped_rows, progress)
    tuning = TuningText(tokens, validation.tokens[: max(1, count // _CALIBRATE_PER_TUNED)])
    texts = (*plan.calibration_texts, text, validation.text)
    plan = replace(plan, calibration_texts=tuple(dict.fromkeys(texts)))
    hashes = {
        "quantizer": plan.quantizer,
        "number of tuning steps": str(plan.tuning_steps),
        "text for the quantizer": digest([text.sha256, validation.text.sha256, count]),
    }
    quantizer_text = QuantizerText(tokens[:count], validation.tokens, tuning)
    return plan, CalibratedQuantization(StreamingModel(source), plan, quantizer_text), hashes


def _by_imatrix(
    source: Source, plan: Plan, path: Path
) -> tuple[Plan, ImatrixQuantization, dict[str, str]]:
    """Return the same for an imatrix. Raises InputError."""
    _require_tokenizer(source)
    imatrix = load_imatrix(path, (source.whole or source).inventory)
    if plan.pruning is not None:
        imatrix = imatrix.pruned(plan.pruning.kept)
    texts = (*plan.calibration_texts, imatrix.text)
    plan = replace(plan, calibration_texts=tuple(dict.fromkeys(texts)))
    hashes = {"quantizer": plan.quantizer, "imatrix": imatrix.text.sha256}
    return plan, ImatrixQuantization(StreamingModel(source), plan, imatrix), hashes


def needed_tokens(source: Source, plan: Plan) -> int:
    """Return the tokens that give an expert 4 inputs for each dimension, evenly routed.

    At least 16,384, which dense layers need.
    """
    tiers = changed_tiers(source, plan)
    widths = [
        weight.shape[-1]
        for name, weight in source.weights.items()
        if name in tiers and len(weight.shape) > 2
    ]
    settings = source.checkpoint.settings
    share = (settings.experts or 1) / (settings.experts_per_token or 1)
    needed = math.ceil(_INPUTS_PER_WIDTH * max(widths, default=0) * share)
    return max(LEAST_QUANTIZER_TOKENS, needed)


def _note_starved(inputs: Mapping[str, ExpertInputs], progress: Progress) -> None:
    """Warn where the median expert of some stacks had fewer inputs than dimensions."""
    starved = [row for row in inputs.values() if row.median < _FED * row.width]
    if starved:
        least = min(starved, key=lambda row: row.median / row.width)
        progress.note(
            f"{len(starved)} of {len(inputs)} expert stacks had fewer inputs per expert than "
            f"dimensions (median {least.median:,.0f} for {least.width:,}). Give more text: "
            "`calibration` and `quantizer_tokens`"
        )


def _read(source: Source, spec: CalibrationSpec, split: str) -> CalibrationSet:
    """Read the quantizer's text. Raises CalibrationError that names its own fields."""
    try:
        with in_field("calibration"):
            return read_calibration_set(source.checkpoint, spec, split)
    except CalibrationError as exc:
        message = str(exc).replace("`tokens`", "`quantizer_tokens`")
        raise CalibrationError(message.replace("`calibration`: `", "`")) from exc
