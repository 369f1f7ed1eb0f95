"""`quantkit verify`: the integrity of a repo."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import Json, Repo, TrustRemoteCode

if TYPE_CHECKING:
    from quantkit.artifacts.report import Report
    from quantkit.evaluation.verify import Check


def verify(
    out: Repo,
    load: Annotated[
        bool,
        typer.Option(help="Load it with stock mlx-lm, and generate a few tokens."),
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Check a repo: files against index, config, plan and hashes, then stock mlx-lm itself.

    Exit code 1 if a check fails. `--no-load` leaves out the loading, for machines with less memory.

    `quantkit verify gpt-oss-20b-16GB`
    """
    from quantkit.publish.record import read_report

    checks = run_checks(out, read_report(out), load, not json, trust_remote_code)
    require_good(checks, json)
    if json:
        console.print_json({"ok": True, "checks": [asdict(check) for check in checks]})


def run_checks(
    out: Path, report: "Report", load: bool, show: bool, trust_remote_code: bool
) -> "list[Check]":
    """Verify a repo, and show every check as it finishes."""
    from quantkit.backend import speed_hint
    from quantkit.evaluation.verify import verify

    total = sum(s.size for s in report.shards) + sum(f.size for f in report.files)
    checks = []
    if load:
        console.note(speed_hint())
    with console.Bars() as bars:
        options = {"load": load, "trust_remote_code": trust_remote_code}
        stage = bars.stage("Verifying", total)
        for check in verify(out, report, progress=stage, **options):
            checks.append(check)
            if show:
                tables.print_checks([check])
    if show:
        tables.print_verdict(checks, str(out))
    return checks


def require_good(checks: "Sequence[Check]", json: bool) -> None:
    """End the process with exit code 1 if a check failed, after printing `json` if asked."""
    if any(check.ok is False for check in checks):
        if json:
            console.print_json({"ok": False, "checks": [asdict(check) for check in checks]})
        raise typer.Exit(1)
