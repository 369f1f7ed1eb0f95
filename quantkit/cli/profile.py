"""`quantkit profile`: what every weight loses in every tier."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import (
    CalibrationName,
    Dtype,
    Json,
    Revision,
    Src,
    Tokens,
    TrustRemoteCode,
)
from quantkit.storage.paths import user_path


def profile(
    src: Src,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="PROFILE", parser=user_path, help="The folder to write."
        ),
    ] = None,
    published: Annotated[
        str | None,
        typer.Option(
            "--profile",
            metavar="PROFILE",
            help="Measure nothing: show this profile, a folder or a Hub id (user/name).",
        ),
    ] = None,
    calibration: CalibrationName = "default",
    tokens: Tokens = 4096,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 256,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**64 - 1, help="Of the text's order and of the labels drawn."),
    ] = 0,
    draws: Annotated[int, typer.Option(help="Labels drawn per token (fisher).")] = 2,
    tiers: Annotated[
        str | None,
        typer.Option(help="Tiers to measure, such as q4g64,q3g64. Default: all but g128."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="fisher: predict from one backward pass. kl: run the whole model for every entry."
        ),
    ] = "fisher",
    rounding: Annotated[
        str,
        typer.Option(help="The rounding to measure with: rtn (enough to choose by), search, gptq."),
    ] = "rtn",
    check: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Then measure N random entries on held-out text, and compare."
        ),
    ] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG", parser=user_path, help="Draw the table (needs the extra `plot`)."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace PROFILE, or an unfinished run of other inputs.")
    ] = False,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Measure what every weight loses in every tier, as KL divergence to the native model.

    Runs the model a layer at a time, forward once and back once; each weight's tiers are tried in
    its own layer only. PROFILE then serves every budget; its `importance.safetensors` holds the
    mean squared input of every channel. A killed run goes on at the layer it had reached, and a
    finished profile given more tiers measures only those.

    `quantkit profile demo -o demo-profile --tokens 1024 --check 48`
    """
    from quantkit.cli.choose import open_model, require_plots
    from quantkit.errors import InputError
    from quantkit.sensitivity.store import load_profile

    if (output is None) == (published is None):
        raise InputError("say where to write it with -o PROFILE, or which to show with --profile.")
    if plot is not None:
        require_plots(plot)
    source = open_model(src, revision, dtype=dtype, trust_remote_code=trust_remote_code)
    checked: dict[str, Any] = {}
    if published is not None:
        made = load_profile(published, source.inventory)
    else:
        from quantkit.backend import speed_hint
        from quantkit.calibration.text import CalibrationSpec
        from quantkit.checkpoint.source import with_values
        from quantkit.sensitivity.entries import parse_tiers
        from quantkit.sensitivity.measure import Settings, is_first, make, make_check, prepare

        assert output is not None
        text = CalibrationSpec(calibration, tokens, sequence_length, seed)
        settings = Settings(text, parse_tiers(tiers), method, rounding, draws)
        console.note(speed_hint())
        profiling = prepare(with_values(source), output, settings, force)
        if profiling.text.about.sequences < text.sequences:
            console.note(f"there is text for {profiling.text.about.tokens:,} tokens only")
        console.note(tables.skipped_rows(profiling.text.about))
        with console.progress(profiling.steps, "Profiling", "steps") as progress:
            made = make(profiling, progress)
        if not is_first():  # one process speaks for all
            return
        if check:
            with console.progress(check, "Checking", "steps") as progress:
                checked = asdict(make_check(profiling, made, check, progress))
    if plot is not None:
        from quantkit.publish.plot import plot_profile

        plot_profile(made, plot)
    if json:
        console.print_json(made.to_json() | ({"check": checked} if checked else {}))
        return
    tables.print_profile(made)
    for line in starved_experts(made.expert_tokens):
        console.note(line)
    if checked:
        tables.print_check(checked)
    if output is not None:
        print(f"Written to {output}.")


_FEW = 16


def starved_experts(expert_tokens: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return a note for every module of experts, by whatever names its stacks go, some experts of
    which saw few tokens; `expert_tokens` gives the tokens that each expert of a stack saw."""
    by_module: dict[str, tuple[int, ...]] = {}
    for name, counts in expert_tokens.items():  # the stacks of a module see the same tokens
        by_module.setdefault(name.rpartition(".")[0], counts)
    notes = []
    for module, counts in by_module.items():
        few = [f"{i} ({n})" for i, n in enumerate(counts) if n < _FEW]
        if few:
            listed = ", ".join(few[:8]) + (f" and {len(few) - 8} more" if len(few) > 8 else "")
            notes.append(f"{module}: fewer than {_FEW} tokens reached experts {listed}")
    return notes
