"""`quantkit verify`: whether a repo is right."""

from dataclasses import asdict
from typing import Annotated

import typer

from quantkit.cli import console
from quantkit.cli.options import Json, Repo


def verify(
    out: Repo,
    load: Annotated[
        bool,
        typer.Option(help="Load it with stock mlx-lm and generate a few tokens; needs its memory."),
    ] = True,
    json: Json = False,
) -> None:
    """Check a repo: files against index, config, plan and hashes, then stock mlx-lm itself.

    Exit code 1 if a check fails. `--no-load` checks all but the loading, on any machine.
    """
    from quantkit.backend import speed_hint
    from quantkit.judge.verify import verify as run_checks
    from quantkit.publish.report import read_report

    found = read_report(out)
    total = sum(s.size for s in found.shards) + sum(f.size for f in found.files)
    checks = []
    if load:
        console.note(speed_hint())
    with console.progress(total, "Verifying") as progress:
        for check in run_checks(out, found, load=load, progress=progress):
            checks.append(check)
            if not json:
                console.print_checks([check])
    failed = any(check.ok is False for check in checks)
    if json:
        console.print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        console.print_verdict(checks, str(out))
    if failed:
        raise typer.Exit(1)
