"""The report inside a repo (`quantkit.json`), and reading it back."""

from pathlib import Path

from quantkit.artifacts.report import REPORT_FILE, Report
from quantkit.errors import OutputError
from quantkit.jsonfile import dump_json, load_json


def report_text(report: Report) -> str:
    """`quantkit.json`, without a date: the same inputs give the same file."""
    return dump_json(report.to_json())


def read_report(repo: Path) -> Report:
    """The report of a repo. Raises OutputError when quantkit did not write it."""
    if not repo.is_dir():
        raise OutputError(f"{repo}: not a folder.")
    path = repo / REPORT_FILE
    if not path.is_file():
        raise OutputError(f"{repo}: has no {REPORT_FILE}: not a repo that quantkit wrote.")
    return Report.from_json(load_json(path, OutputError), str(path))
