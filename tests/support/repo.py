"""Repos, written from a plan as the library does it."""

from collections.abc import Callable
from pathlib import Path

from quantkit.artifacts.plan import Plan
from quantkit.artifacts.report import Report
from quantkit.checkpoint.source import Source
from quantkit.jobs.quantize import write_plan
from quantkit.jobs.quantize_options import QuantizeOptions
from quantkit.progress import Progress, Stage


class Calls(Progress):
    """Calls a function on every advance of every stage."""

    def __init__(self, advance: Stage) -> None:
        self._advance = advance

    def stage(self, title: str, total: int, unit: str = "bytes") -> Stage:
        return self._advance


def write_repo(
    source: Source,
    plan: Plan,
    out: Path,
    progress: Callable[[int, str], None] | None = None,
    **options: object,
) -> Report:
    """Write the repo of a plan with `options` of QuantizeOptions, and return its report."""
    shown = None if progress is None else Calls(progress)
    return write_plan(source, plan, out, QuantizeOptions(**options), progress=shown).report
