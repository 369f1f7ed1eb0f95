"""The report inside a repo (`quantkit.json`): written, updated and read."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.artifacts.report import Report
from quantkit.errors import OutputError
from quantkit.publish.card import CARD_FILE, card
from quantkit.publish.pictures import pictures
from quantkit.storage.hashing import hash_file
from quantkit.storage.json_files import dump_json, encoded, load_json, write_atomically
from quantkit.storage.paths import REPORT_FILE


def documents(report: Report) -> dict[str, str | bytes]:
    """Return report, card and its pictures, name -> content.

    They have no date: equal inputs give equal files.
    """
    drawn = pictures(report)
    text = card(report, tuple(drawn))
    cards = dict.fromkeys((*report.cards[-1:], _sha256(text)))
    complete = replace(report, cards=tuple(cards))
    return {REPORT_FILE: dump_json(complete.to_json()), CARD_FILE: text, **drawn}


def updated(repo: Path, report: Report) -> dict[str, str | bytes]:
    """Return the changed files, name -> content, when `report` replaces the one in `repo`.

    A card edited by hand stays. Raises OutputError.
    """
    texts, path = documents(report), repo / CARD_FILE
    if path.exists() and hash_file(path, CARD_FILE) not in (
        *report.cards,
        _sha256(texts[CARD_FILE]),
    ):
        del texts[CARD_FILE]
    return texts


def record(out: Path, **fields: Any) -> bool:
    """Set `fields` of the report in `out`, and renew the card.

    Returns False if the card was edited by hand, and stays. Raises OutputError.
    """
    texts = updated(out, replace(read_report(out), **fields))
    for name in sorted(texts, reverse=True):  # the report first: it has the hashes of both cards
        write_atomically(out / name, texts[name])
    return CARD_FILE in texts


def _sha256(text: str | bytes) -> str:
    return hashlib.sha256(encoded(text)).hexdigest()


def read_report(repo: Path) -> Report:
    """Read the report of a repo. Raises OutputError if quantkit did not write it."""
    if not repo.is_dir():
        raise OutputError(f"{repo}: not a folder.")
    path = repo / REPORT_FILE
    if not path.is_file():
        raise OutputError(f"{repo}: {REPORT_FILE} is missing: quantkit did not write this repo.")
    return Report.from_json(load_json(path, OutputError), str(path))
