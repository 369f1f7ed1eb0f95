"""`quantkit profile`: the KL cost of every weight in every tier."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import (
    OUTPUT,
    QUANTIZER,
    Experts,
    Force,
    Json,
    Memory,
    Plot,
    Prune,
    SourceOptions,
    Src,
    TextOptions,
    memory_bytes,
    named_path,
    requested_experts,
)

if TYPE_CHECKING:
    from quantkit.artifacts.sensitivity import SensitivityProfile
    from quantkit.checkpoint.source import Source

_FEW = 16  # tokens


@dataclass(frozen=True)
class ProfileOptions:
    """How to measure, and where to write."""

    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PROFILE",
            parser=named_path,
            rich_help_panel=OUTPUT,
            help="Folder to write.",
        ),
    ] = None
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            metavar="PROFILE",
            rich_help_panel=OUTPUT,
            help="Show this profile instead: a folder, or a Hub id (user/name).",
        ),
    ] = None
    plot: Plot = None
    force: Force = False
    tiers: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Measurement",
            help="Tiers to measure for all weights, such as q4g64,q3g64, or `all`. Default: tiers "
            "that can matter.",
        ),
    ] = None
    routers: Annotated[
        bool,
        typer.Option(
            "--routers",
            rich_help_panel="Measurement",
            help="Measure routers in fewer than 8 bits, too.",
        ),
    ] = False
    method: Annotated[
        str,
        typer.Option(
            rich_help_panel="Measurement",
            help="fisher: predict from one backward pass. kl: run the whole model per entry.",
        ),
    ] = "fisher"
    draws: Annotated[
        int, typer.Option(rich_help_panel="Measurement", help="Labels drawn per token (fisher).")
    ] = 3
    quantizer: Annotated[
        str,
        typer.Option(
            rich_help_panel=QUANTIZER,
            help="Quantizer to measure with: rtn (sufficient to choose tiers), search or gptq.",
        ),
    ] = "rtn"
    check: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            rich_help_panel="Measurement",
            help="Validate: measure N random entries on other documents.",
        ),
    ] = 0
    experts: Experts = None
    prune: Prune = False
    memory: Memory = None


def profile(
    src: Src,
    options: ProfileOptions,
    text: TextOptions,
    opening: SourceOptions,
    json: Json = False,
) -> None:
    """Measure the KL cost of every weight in every tier.

    Runs the model a layer at a time, once forward and once backward. The profile then serves every
    budget. A killed run resumes at its last layer; a finished profile given more tiers measures
    only those.

    `quantkit profile demo -o demo-profile --tokens 1024 --check 48`
    """
    from quantkit.backend.memory_limits import limited_memory
    from quantkit.errors import InputError
    from quantkit.sensitivity.store import load_profile

    if (options.output is None) == (options.profile is None):
        raise InputError("give either `output` PROFILE to write, or `profile` PROFILE to show.")
    if options.plot is not None:
        from quantkit.publish.plot import require_plots

        require_plots(options.plot)
    source = opening.open(src)
    validation: dict[str, Any] = {}
    if options.profile is not None:
        result = load_profile(options.profile, source.inventory)
    else:
        with limited_memory(memory_bytes(options.memory)):
            measured = _measured(source, options, text)
        if measured is None:
            return
        result, validation = measured
    if options.plot is not None:
        from quantkit.publish.plot import plot_profile

        plot_profile(result, options.plot)
    if json:
        console.print_json(result.to_json() | ({"check": validation} if validation else {}))
        return
    tables.print_profile(result)
    for line in starved_experts(result.expert_tokens):
        console.note(line)
    if validation:
        tables.print_validation(validation)
    if options.output is not None:
        print(f"Written to {options.output}.")


def _measured(
    source: "Source", options: ProfileOptions, text: TextOptions
) -> "tuple[SensitivityProfile, dict[str, Any]] | None":
    """Return the profile and its validation; None in processes that do not report."""
    from quantkit.backend import speed_hint
    from quantkit.jobs.profile import prepare_profile, run_profiling
    from quantkit.sensitivity.entries import parse_tiers
    from quantkit.sensitivity.measure import ProfileSettings, is_first, validate_profile

    assert options.output is not None
    tiers = parse_tiers(options.tiers)
    settings = ProfileSettings(
        text.spec(),
        tiers,
        options.method,
        options.quantizer,
        options.draws,
        routers=options.routers,
        experts=requested_experts(options.experts, options.prune),
    )
    console.note(speed_hint())
    profiling = prepare_profile(source, options.output, settings, options.force)
    with console.Bars() as progress:
        result = run_profiling(profiling, progress)
        if not is_first():  # of several processes, only the first reports
            return None
        validation: dict[str, Any] = {}
        if options.check:
            stage = progress.stage("Validating", options.check, "steps")
            validation = asdict(validate_profile(profiling, result, options.check, stage))
    return result, validation


def starved_experts(expert_tokens: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return a note for every module with experts that received few tokens.

    `expert_tokens` maps stacks to the tokens of each expert.
    """
    by_module: dict[str, tuple[int, ...]] = {}
    for name, counts in expert_tokens.items():  # the stacks of a module share their tokens
        by_module.setdefault(name.rpartition(".")[0], counts)
    notes = []
    for module, counts in by_module.items():
        few = [f"{i} ({n})" for i, n in enumerate(counts) if n < _FEW]
        if few:
            listed = ", ".join(few[:8]) + (f" and {len(few) - 8} more" if len(few) > 8 else "")
            notes.append(f"{module}: fewer than {_FEW} tokens reached experts {listed}")
    return notes
