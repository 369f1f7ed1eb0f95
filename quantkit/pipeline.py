"""The stages put together: a source and a plan in, a repo with its report and card out."""

from dataclasses import replace
from pathlib import Path

from quantkit.artifacts.plan import Plan
from quantkit.artifacts.profile import Profile
from quantkit.artifacts.report import REPORT_FILE, Report
from quantkit.places import plain_path
from quantkit.profile.profile import Settings, make, prepare
from quantkit.progress import Progress
from quantkit.publish.card import card, license_of
from quantkit.publish.report import read_report, report_text
from quantkit.rewrite.rewrite import SHARD_BYTES, Written, rewrite
from quantkit.source.hub import is_repo_id
from quantkit.source.source import Source, with_values
from quantkit.staging import require_apart, require_free, versions


def quantize(
    source: Source,
    plan: Plan,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Carry `plan` out: write the repo `out`, its report and card included, and give the report.

    A source on the Hub is downloaded first. Raises what `rewrite` raises, and HubError.
    """
    if source.checkpoint.folder is None:  # what `rewrite` checks too, before the download
        require_apart(plain_path(out), None)
        if not (out / REPORT_FILE).exists():
            require_free(plain_path(out), force)
        source = with_values(source)
    name = source.checkpoint.name
    base_model = name if is_repo_id(name) else None  # a local folder's name has no slash
    license_id = license_of(source.checkpoint.path(""))

    def documents(written: Written) -> dict[str, str]:
        made = replace(plan, source=written.source)
        report = Report(made, written.shards, written.files, versions())
        return {REPORT_FILE: report_text(report), "README.md": card(report, base_model, license_id)}

    rewrite(source, plan, out, documents, shard_bytes=shard_bytes, force=force, progress=progress)
    return read_report(out)


def make_profile(
    source: Source,
    out: Path,
    settings: Settings | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """Measure what every weight of `source` loses in every tier, and write it to the folder `out`.

    A source on the Hub is downloaded first. Raises InputError.
    """
    profiling = prepare(with_values(source), out, settings or Settings(), force)
    return make(profiling, progress or (lambda _done, _name: None))
