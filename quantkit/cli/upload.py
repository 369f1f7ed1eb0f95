"""`quantkit upload`: a repo goes to the Hub."""

from dataclasses import asdict
from typing import Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import Json, Repo, TrustRemoteCode


def upload(
    out: Repo,
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="What it is called there.")],
    private: Annotated[
        bool, typer.Option("--private", help="A new repo is seen by you alone.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Default: the main branch.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    load: Annotated[
        bool,
        typer.Option(help="Load it with stock mlx-lm first, as `quantkit verify` does."),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent; the Hub is not asked.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Write over a model that quantkit did not make.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Verify a repo, then send it to the Hugging Face Hub, with its report and model card.

    Log in first: `hf auth login`. An interrupted upload goes on when the command is run again.
    Nothing is sent of OUT but what is listed by --dry-run; card and report come to name USER/NAME.

    `quantkit upload gpt-oss-20b-16GB user/gpt-oss-20b-16GB --private`
    """
    from quantkit.cli.verify import require_good, run_checks
    from quantkit.publish.report import read_report
    from quantkit.publish.upload import is_foreign, plan_upload, send

    report = read_report(out)
    planned = plan_upload(out, report, repo, private=private, revision=revision, message=message)
    # Asked first: without a token all else is in vain.
    foreign = not dry_run and is_foreign(planned)
    if foreign and not yes:
        question = f"{repo} holds a model that quantkit did not make. Write over it?"
        console.require_yes(question, "--yes", "nothing was sent.")
    checks = run_checks(out, report, load and not dry_run, not json, trust_remote_code)
    require_good(checks, json)
    if dry_run:
        if json:
            console.print_json(asdict(planned) | {"bytes": planned.bytes})
        else:
            tables.print_upload(planned)
        return
    address = send(out, report, planned)
    if json:
        console.print_json(asdict(planned) | {"bytes": planned.bytes, "address": address})
    else:
        print(f"Sent: {address}")
    console.record(out, repo=repo)
