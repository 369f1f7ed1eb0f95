"""The stages put together: a source and a plan in, a repo with its report and card out."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quantkit.artifacts.fidelity import Fidelity
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.profile import SensitivityProfile
from quantkit.artifacts.report import REPORT_FILE, Report
from quantkit.backend import mx
from quantkit.calibration.text import CalibrationSpec, load_tokenizer, read_text
from quantkit.checkpoint.hub import is_repo_id
from quantkit.checkpoint.source import Source, with_values
from quantkit.errors import CalibrationError, InputError, UntrustedCodeError
from quantkit.evaluation import fidelity
from quantkit.formats.tiers import Tier, parse_tier
from quantkit.macs import MemoryTarget, memory_needed
from quantkit.planning.allocator import (
    Constraints,
    Limits,
    corrected_by,
    plan_by_budget,
    recipe_baselines,
)
from quantkit.progress import Progress
from quantkit.publish.card import license_of
from quantkit.publish.report import documents, read_report, record
from quantkit.quantizers.layerwise import EMBEDDING_TOKENS, LayerRounder, RoundingText
from quantkit.quantizers.rounding import require_method
from quantkit.quantizers.scale_tuning import Tuning
from quantkit.sensitivity.measure import Settings, make, prepare
from quantkit.staging import require_apart, require_free, versions
from quantkit.storage.json_files import digest
from quantkit.storage.paths import plain_path
from quantkit.streaming import measure_kl as joint
from quantkit.streaming.attention import attention_settings, require_same_attention
from quantkit.streaming.layer_runner import StreamingModel, has_gradients
from quantkit.writer.config import companions
from quantkit.writer.writer import SHARD_BYTES, Rounder, Rounding, Written, rewrite

ROUNDING_TEXT = CalibrationSpec(tokens=16384)
_VALIDATED = 8  # for so many sequences that are rounded on, one more


def quantize(
    source: Source,
    plan: Plan,
    out: Path,
    *,
    text: CalibrationSpec | None = None,
    shard_bytes: int = SHARD_BYTES,
    room: MemoryTarget | None = None,
    command: str | None = None,
    base_model: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Carry `plan` out: write the repo `out`, its report and card included, and give the report.

    `text` is what to round on where the plan's rounding is a calibrated one; `room` is for what the
    report says of memory, `command` for how it says that the repo was made, `base_model` the Hub id
    that the card names, by default the source's own. A source on the Hub is
    downloaded first. Raises what `rewrite` raises, InputError, CalibrationError and HubError.
    """
    require_same_attention(source.checkpoint)
    if base_model is not None and not is_repo_id(base_model):
        raise InputError(f"--base-model {base_model!r}: not a Hub id. Write it like user/name.")
    if source.checkpoint.folder is None:  # what `rewrite` checks too, before the download
        require_apart(plain_path(out), None)
        if not (out / REPORT_FILE).exists():
            require_free(plain_path(out), force)
        source = with_values(source)
    companions(source.checkpoint.path(""), source.inventory)  # names what is missing
    if plan.rounding == "rtn":  # else the text is read with it
        _require_tokenizer(source)
    name = source.checkpoint.name
    if base_model is None and is_repo_id(name):  # a local folder's name has no slash
        base_model = name
    stated = license_of(source.checkpoint.path(""))
    memory = memory_needed(plan.total_bytes, source.checkpoint.config, room)

    def describe(written: Written) -> dict[str, str]:
        made = replace(carried, source=written.source)
        return documents(
            Report(
                made,
                written.shards,
                written.files,
                versions(),
                attention_settings(source.checkpoint.stated_config),
                base_model,
                stated,
                command,
                memory,
            )
        )

    carried, rounding = _calibrated(source, plan, text or ROUNDING_TEXT, shard_bytes)
    rewrite(
        source,
        carried,
        out,
        describe,
        rounding=rounding,
        shard_bytes=shard_bytes,
        force=force,
        progress=progress,
    )
    if base_model is not None and read_report(out).base_model != base_model:
        record(out, base_model=base_model)  # it was complete already, under another name
    return read_report(out)


def _require_tokenizer(source: Source) -> None:
    """Raises CalibrationError where stock mlx-lm cannot read the tokenizer, which is better known
    before hours of work. Code of its own is for who runs the repo to allow; a folder whose name is
    no text is refused by the tokenizers library, whatever it holds."""
    if str(source.checkpoint.path("")).isprintable():
        with suppress(UntrustedCodeError):
            load_tokenizer(source.checkpoint)


def _calibrated(
    source: Source, plan: Plan, request: CalibrationSpec, shard_bytes: int
) -> tuple[Plan, Rounding | None]:
    """How to round, and the plan with the text that it is done on."""
    if plan.rounding == "rtn" and plan.tuning_steps:
        raise InputError("--tune goes with --rounding search or gptq.")
    if plan.rounding == "rtn":
        return plan, None
    require_method(plan.rounding)
    if plan.tuning_steps and not has_gradients(source):
        raise InputError("--tune: a mixture of experts needs mlx-lm 0.32 (and so Python 3.11).")
    count = request.sequences
    validated = max(1, count // _VALIDATED) if plan.tuning_steps else 0
    if plan.tuning_steps:  # new text for every step, and some to see which step is best
        tuned = max(request.tokens, Tuning(plan.tuning_steps).all_tokens)
        request = replace(request, tokens=tuned + validated * request.sequence_length)
    text = read_text(source.checkpoint, request)
    rest = len(text.tokens) - min(validated, max(0, len(text.tokens) - count))
    parts = RoundingText(text.tokens[:count], text.tokens[:rest], text.tokens[rest:])
    if plan.tuning_steps and not len(parts.validation):
        raise CalibrationError(
            f"{text.about.name}: holds no text beside what is rounded on. Give fewer "
            "--rounding-tokens, or more text."
        )
    plan = replace(
        plan, calibration_texts=tuple(dict.fromkeys((*plan.calibration_texts, text.about)))
    )
    model = StreamingModel(source)

    def make(folder: Path, progress: Progress) -> Rounder:
        return LayerRounder(model, plan, parts, folder, progress)

    depends = {
        "rounding": plan.rounding,
        "number of tuning steps": str(plan.tuning_steps),
        "text to round on": digest([text.about.sha256, count, rest]),
    }
    space = _waiting(model, plan, text.tokens.size, shard_bytes)
    return plan, Rounding(depends, make, space)


def _waiting(model: StreamingModel, plan: Plan, tokens: int, shard_bytes: int) -> int:
    """Bytes of disk for what waits while it is rounded on so many `tokens`."""
    layers = [sum(c.bytes for c in plan.choices if c.layer == i) for i in range(len(model.layers))]
    affine = [
        (choice, tier)
        for choice in plan.choices
        if (tier := parse_tier(choice.storage)).mode == "affine"
    ]
    stream = 4 * model.head_weight.shape[-1]  # bytes per token
    # The streams of two layers, and the layers of a shard that is not full yet.
    space = 2 * stream * tokens + 2 * max(layers, default=0) + min(shard_bytes, plan.total_bytes)
    if any(choice.role == "embedding" for choice, _ in affine):  # all inputs, for the way back
        space += stream * min(tokens, EMBEDDING_TOKENS) * (len(layers) + 3)
    if plan.tuning_steps:  # all that is rounded; per group two generations of six values in float32
        groups = sum(choice.parameters // tier.group_size for choice, tier in affine)
        space += plan.total_bytes + 52 * groups
    return space


def _silent(_done: int, _name: str) -> None:
    pass


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan that was measured, and the profile, corrected by then, that it was chosen by."""

    plan: Plan
    kl: float
    profile: SensitivityProfile


def refine(
    source: Source,
    profile: SensitivityProfile,
    limits: Limits,
    constraints: Constraints,
    *,
    rounds: int = 1,
    tokens: int = 2048,
    progress: Progress | None = None,
) -> list[MeasuredPlan]:
    """The plans that were really measured, the best first.

    Losses add up only approximately. So the plan is measured, whole and one role at a time, the
    predictions of each role are corrected by what was found, and the budget is solved anew,
    `rounds` times. Shipped recipes that fit the limits and are as large stand for election, too.
    Measured on `tokens` of the default text, which every plan then names among its calibrations;
    what is held out of it is left for the judge. Raises InputError.
    """
    tell = progress or _silent
    source = with_values(source)
    about = profile.calibration
    request = CalibrationSpec(tokens=tokens, sequence_length=about.sequence_length, seed=about.seed)
    text = read_text(source.checkpoint, request)
    calibration_texts = tuple(dict.fromkeys((about, text.about)))
    model = StreamingModel(source)
    corrected, plan = profile, plan_by_budget(source.inventory, profile, limits, constraints)
    measured_plans: list[MeasuredPlan] = []
    waiting = [plan, *recipe_baselines(source.inventory, profile, limits, constraints)]
    for number in range(rounds + 1):
        plan = waiting[0]
        roles = list(dict.fromkeys(source.weights[name].role for name in changes(source, plan)))
        wanted = roles if number < rounds else []  # after the last one nothing is corrected
        tried = [changes(source, p) for p in waiting]
        tried += [changes(source, plan, role) for role in wanted]
        losses = joint.measured(model, mx.array(text.tokens), tried, lambda _: tell(1, "measuring"))
        found = [float(loss.mean(dtype=np.float64)) for loss in losses]
        for p, kl in zip(waiting, found, strict=False):
            named = replace(p, measured_kl=kl, calibration_texts=calibration_texts)
            measured_plans.append(MeasuredPlan(named, kl, corrected))
        known = {measured_plan.plan.tiers_sha256 for measured_plan in measured_plans}
        by_role = dict(zip(wanted, found[len(waiting) :], strict=True))
        corrected = corrected_by(corrected, plan, by_role)
        waiting = [plan_by_budget(source.inventory, corrected, limits, constraints)]
        if not wanted or waiting[0].tiers_sha256 in known:
            break
    return sorted(measured_plans, key=lambda measured_plan: measured_plan.kl)


def changes(source: Source, plan: Plan, role: str | None = None) -> dict[str, Tier]:
    """Weight -> tier where `plan` stores it otherwise than the source; of one role if asked."""
    return {
        choice.name: parse_tier(choice.storage)
        for choice in plan.choices
        if choice.storage != source.weights[choice.name].storage and role in (None, choice.role)
    }


def compare(
    native: Source,
    repos: Sequence[str],
    request: CalibrationSpec | None = None,
    *,
    progress: Progress | None = None,
) -> list[Fidelity]:
    """How close each of `repos` (folders or Hub ids) is to `native`, on text that is held out.

    Raises InputError for a repo with another tokenizer, or one that was made with this text.
    """
    comparison = fidelity.prepare(native, repos, request or CalibrationSpec())
    return fidelity.compare(comparison, progress or _silent)


def make_profile(
    source: Source,
    out: Path,
    settings: Settings | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> SensitivityProfile:
    """Measure what every weight of `source` loses in every tier, and write it to the folder `out`.

    A source on the Hub is downloaded first. Raises InputError.
    """
    profiling = prepare(with_values(source), out, settings or Settings(), force)
    return make(profiling, progress or _silent)
