"""`quantkit quantize`: the main job."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import (
    ActiveBytes,
    BudgetOption,
    CalibrationName,
    Context,
    Dtype,
    Json,
    MinTier,
    Pins,
    PlanFile,
    ProfileName,
    RecipeName,
    Refine,
    Reserve,
    Revision,
    RoundingName,
    Routers,
    Speed,
    Src,
    Tiers,
    Ties,
    Tokens,
    TrustRemoteCode,
    command_line,
)
from quantkit.storage.paths import user_path


def quantize(
    ctx: typer.Context,
    src: Src,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", parser=user_path, help="The folder to write."
        ),
    ],
    budget: BudgetOption = None,
    profile: ProfileName = None,
    recipe: RecipeName = None,
    plan: PlanFile = None,
    pin: Pins = None,
    tie: Ties = None,
    tiers: Tiers = None,
    min_tier: MinTier = None,
    routers: Routers = False,
    active_bytes: ActiveBytes = None,
    speed: Speed = None,
    context: Context = "8k",
    reserve: Reserve = "1.5GB",
    rounding: RoundingName = None,
    refine: Refine = 0,
    calibration: CalibrationName = "default",
    tokens: Tokens = 4096,
    tune: Annotated[
        int,
        typer.Option(
            metavar="STEPS",
            min=0,
            help="After search or gptq, tune scales and biases by the KL divergence to the native "
            "model, so many steps of 1,024 tokens (60 pay well).",
        ),
    ] = 0,
    rounding_tokens: Annotated[
        int, typer.Option(help="How many tokens of the text to round on (search, gptq).")
    ] = 16384,
    shard_size: Annotated[
        str, typer.Option(help="Largest shard, such as 5GB or 4GiB (tensors; headers aside).")
    ] = "5GB",
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT, or an unfinished run of other inputs.")
    ] = False,
    dtype: Dtype = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME",
            help="The Hub id that the model card names as the base of a local folder.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Rewrite a checkpoint into a repo that stock mlx-lm loads.

    With --budget the tiers of least predicted loss are chosen, by --profile, or else by a profile
    that is made first (in OUT-profile, kept for later budgets).

    Streams through the source: rounding to nearest takes a few hundred MB of memory for gpt-oss and
    dense models, whatever their size, gptq a layer and what its modules see of the text. OUT
    appears when it is finished and not before; a killed run leaves OUT.partial, and the same
    command goes on from there.

    `quantkit quantize openai/gpt-oss-20b --budget mac:16GB -o gpt-oss-20b-16GB`

    `quantkit quantize openai/gpt-oss-20b -r mxfp4-q8 -o gpt-oss-20b-q8`
    """
    from quantkit.artifacts.report import REPORT_FILE
    from quantkit.backend import speed_hint
    from quantkit.calibration.text import CalibrationSpec
    from quantkit.cli.choose import Asked, open_model, profile_for, settle_plan
    from quantkit.errors import InputError
    from quantkit.jobs.pipeline import quantize as write_repo
    from quantkit.staging import require_apart, require_free
    from quantkit.units import parse_bytes

    shard_bytes = parse_bytes(shard_size)
    if shard_bytes == 0:
        raise InputError("--shard-size: shards of 0 bytes hold nothing. Write it like 5GB.")
    asked = Asked(
        recipe=recipe,
        plan=plan,
        budget=budget,
        profile=profile,
        pins=tuple(pin or ()),
        ties=tuple(tie or ()),
        tiers=tiers,
        min_tier=min_tier,
        routers=routers,
        active_bytes=active_bytes,
        speed=speed,
        context=context,
        reserve=reserve,
        rounding=rounding,
        refine=refine,
    )
    asked.require_one_way()
    if tune and (rounding or ("gptq" if budget is not None else "rtn")) == "rtn" and plan is None:
        raise InputError("--tune goes with --rounding search or gptq.")
    for kept in (plan, Path(profile) if profile else None):
        require_apart(output, kept if kept is not None and kept.exists() else None)
    source = open_model(src, revision, dtype=dtype, trust_remote_code=trust_remote_code)
    require_apart(output, source.checkpoint.folder)
    if not (output / REPORT_FILE).exists():
        require_free(output, force)
    known = profile_for(source, asked, output, CalibrationSpec(calibration, tokens), force)
    chosen, _ = settle_plan(source, asked, known)
    if tune:
        chosen = replace(chosen, tuning_steps=tune)
    console.note(speed_hint())
    was_there = (output / REPORT_FILE).exists() and not force
    resumed = Path(f"{output}.partial", "state.json").exists() and not force
    with console.progress(chosen.total_bytes, f"Writing {output.name}") as progress:
        report = write_repo(
            source,
            chosen,
            output,
            text=CalibrationSpec(calibration, rounding_tokens),
            shard_bytes=shard_bytes,
            room=asked.room,
            command=command_line(ctx),
            base_model=base_model,
            force=force,
            progress=progress,
        )
    for text in report.plan.calibration_texts:
        console.note(tables.skipped_rows(text))
    if json:
        console.print_json(report.to_json())
        return
    tables.print_report(report, str(output))
    if was_there:
        print("It was complete already; nothing was written.")
    else:
        if resumed:
            print("Went on from a run that had not finished.")
        print(f"Written. Check it with: quantkit verify {output}")
