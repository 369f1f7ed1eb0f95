"""The report inside a repo (`quantkit.json`), and reading it back."""

from pathlib import Path

from quantkit.artifacts.report import REPORT_FILE, Report
from quantkit.errors import OutputError
from quantkit.jsonfile import dump_json, load_json, read_text, write_atomically
from quantkit.publish.card import CARD_FILE, card


def documents(report: Report) -> dict[str, str]:
    """Name -> text of report and card, without a date: the same inputs give the same files."""
    return {REPORT_FILE: dump_json(report.to_json()), CARD_FILE: card(report)}


def updated(repo: Path, report: Report) -> dict[str, str]:
    """Name -> text of what changes in `repo` when `report` takes the place of its report.

    A card that a person has edited is theirs, and stays. Raises OutputError.
    """
    before, after = documents(read_report(repo)), documents(report)
    path = repo / CARD_FILE
    if path.exists() and read_text(path, OutputError) not in (before[CARD_FILE], after[CARD_FILE]):
        del after[CARD_FILE]
    return after


def record(repo: Path, report: Report) -> bool:
    """Put `report` in the place of the repo's report, and renew the card; False if that was edited
    by a person and so left alone. Raises OutputError."""
    texts = updated(repo, report)
    for name in sorted(texts):  # the card first: killed in between, it is still known for ours
        write_atomically(repo / name, texts[name])
    return CARD_FILE in texts


def read_report(repo: Path) -> Report:
    """The report of a repo. Raises OutputError when quantkit did not write it."""
    if not repo.is_dir():
        raise OutputError(f"{repo}: not a folder.")
    path = repo / REPORT_FILE
    if not path.is_file():
        raise OutputError(f"{repo}: has no {REPORT_FILE}: not a repo that quantkit wrote.")
    return Report.from_json(load_json(path, OutputError), str(path))
