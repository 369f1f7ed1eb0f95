"""Rewrite, report and card put together, as `quantize` and `demo` need them."""

from pathlib import Path

from quantkit.artifacts import REPORT_FILE, Plan, Report
from quantkit.backend import speed_hint
from quantkit.cli import console
from quantkit.publish.card import card, license_of
from quantkit.publish.report import make_report, read_report, report_text
from quantkit.rewrite.rewrite import SHARD_BYTES, Written, rewrite, versions
from quantkit.source.hub import is_repo_id
from quantkit.source.source import Source, with_values


def write_repo(
    source: Source, plan: Plan, out: Path, *, shard_bytes: int = SHARD_BYTES, force: bool = False
) -> Report:
    """Carry `plan` out with a progress bar, and give the report of what was written."""
    if hint := speed_hint():
        console.note(f"note: {hint}")
    source = with_values(source)
    name = source.checkpoint.name
    base_model = name if is_repo_id(name) and not Path(name).exists() else None
    license_id = license_of(source.checkpoint.path(""))

    def documents(written: Written) -> dict[str, str]:
        report = make_report(plan, written.source, written.shards, versions())
        return {REPORT_FILE: report_text(report), "README.md": card(report, base_model, license_id)}

    with console.progress(plan.total_bytes, f"Writing {out.name}") as progress:
        rewrite(
            source, plan, out, documents, shard_bytes=shard_bytes, force=force, progress=progress
        )
    return read_report(out)
