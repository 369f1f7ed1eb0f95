"""The report inside a repo (`quantkit.json`), and reading it back."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.artifacts.report import REPORT_FILE, Report
from quantkit.checkpoint.checkpoint import hash_file
from quantkit.errors import OutputError
from quantkit.publish.card import CARD_FILE, card
from quantkit.storage.json_files import dump_json, encoded, load_json, write_atomically


def documents(report: Report) -> dict[str, str]:
    """Name -> text of report and card, without a date: the same inputs give the same files."""
    drawn = card(report)
    cards = dict.fromkeys((*report.cards[-1:], _sha256(drawn)))
    known = replace(report, cards=tuple(cards))
    return {REPORT_FILE: dump_json(known.to_json()), CARD_FILE: drawn}


def updated(repo: Path, report: Report) -> dict[str, str]:
    """Name -> text of what changes in `repo` when `report` takes the place of its report.

    A card that a person has edited is theirs, and stays. Raises OutputError.
    """
    texts, path = documents(report), repo / CARD_FILE
    if path.exists() and hash_file(path, CARD_FILE) not in (
        *report.cards,
        _sha256(texts[CARD_FILE]),
    ):
        del texts[CARD_FILE]
    return texts


def record(out: Path, **found: Any) -> bool:
    """Put what was found into the fields of the report in `out`, and renew the card; False if that
    was edited by a person and so left alone. Raises OutputError."""
    texts = updated(out, replace(read_report(out), **found))
    for name in sorted(texts, reverse=True):  # the report first: it knows both cards
        write_atomically(out / name, texts[name])
    return CARD_FILE in texts


def _sha256(text: str) -> str:
    return hashlib.sha256(encoded(text)).hexdigest()


def read_report(repo: Path) -> Report:
    """The report of a repo. Raises OutputError when quantkit did not write it."""
    if not repo.is_dir():
        raise OutputError(f"{repo}: not a folder.")
    path = repo / REPORT_FILE
    if not path.is_file():
        raise OutputError(f"{repo}: has no {REPORT_FILE}: not a repo that quantkit wrote.")
    return Report.from_json(load_json(path, OutputError), str(path))
