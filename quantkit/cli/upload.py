"""`quantkit upload`: publish a repo on the Hub."""

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from quantkit.cli import console, tables
from quantkit.cli.options import Json, Repo, TrustRemoteCode


@dataclass(frozen=True)
class UploadOptions:
    """The target of an upload, and the checks before."""

    private: Annotated[bool, typer.Option("--private", help="Create a new repo as private.")] = (
        False
    )
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch. Default: main.")
    ] = None
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None
    load: Annotated[
        bool, typer.Option(help="Load it with stock mlx-lm first, as `quantkit verify` does.")
    ] = True
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files without contacting the Hub.")
    ] = False
    yes: Annotated[
        bool,
        typer.Option("--yes", "-y", help="Overwrite a model that quantkit did not make."),
    ] = False
    trust_remote_code: TrustRemoteCode = False


def upload(
    out: Repo,
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Name of the repo on the Hub.")],
    options: UploadOptions,
    json: Json = False,
) -> None:
    """Verify a repo, then upload it to the Hugging Face Hub, with its report and model card.

    Log in first: `hf auth login`. An interrupted upload resumes when the command runs again. Only
    the files listed by `--dry-run` are sent; card and report will name USER/NAME.

    `quantkit upload gpt-oss-20b-16GB user/gpt-oss-20b-16GB --private`
    """
    from quantkit.cli.verify import require_good, run_checks
    from quantkit.publish.record import read_report
    from quantkit.publish.upload import is_foreign, plan_upload, send

    report = read_report(out)
    planned = plan_upload(
        out,
        report,
        repo,
        private=options.private,
        revision=options.revision,
        message=options.message,
    )
    # First, since nothing works without a token.
    if not options.dry_run and is_foreign(planned) and not options.yes:
        question = f"{repo} holds a model that quantkit did not make. Overwrite it?"
        console.require_yes(question, "--yes", "nothing was sent.")
    load = options.load and not options.dry_run
    require_good(run_checks(out, report, load, not json, options.trust_remote_code), json)
    result = asdict(planned) | {"bytes": planned.bytes}
    if not options.dry_run:
        result["address"] = send(out, report, planned)
    if json:
        console.print_json(result)
    elif options.dry_run:
        tables.print_upload(planned)
    else:
        print(f"Sent: {result['address']}")
    if not options.dry_run:
        console.record(out, repo=repo)
