"""Records of a benchmark: every prompt, answer and verdict, a JSON object a line.

The first line states the model, the data, the definition and the settings; their hash is in the
file's name, so that a run resumes from its own records only, and a finished one is read again.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import OutputError
from quantkit.storage.hashing import digest
from quantkit.storage.json_files import read_text, whole_lines, write_atomically

Record = dict[str, Any]
"""`id`, `repeat`, `prompt`, `output`, `final`, `calls`, `verdict`, `tokens`, and the `seconds`
since the answer before; `arithmetic` and `versions` tell how it was generated."""


class Records:
    """The records of one model on one benchmark, in `folder`. `header` states all that they
    depend on.
    """

    def __init__(self, folder: Path, benchmark: str, header: Mapping[str, Any]) -> None:
        """Read the records of an earlier run. Raises OutputError if they are damaged."""
        self.path = folder / f"{benchmark}-{digest(dict(header))[:16]}.jsonl"
        self._header = dict(header)
        self.rows: dict[tuple[str, int], Record] = {}
        if self.path.exists():
            self._read()

    def add(self, row: Record) -> None:
        """Append a record. Raises OutputError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            with open(self.path, "a", encoding="utf-8") as file:
                for value in [self._header, row] if new else [row]:
                    file.write(_line(value))
        except OSError as exc:
            raise OutputError(f"{self.path}: cannot be written ({exc.strerror}).") from exc
        self.rows[row["id"], row["repeat"]] = row

    def sort(self, order: Iterable[str]) -> None:
        """Put the records in the `order` of their ids, those of other ids last."""
        places = {identity: place for place, identity in enumerate(order)}
        last = len(places)
        self.rows = dict(
            sorted(self.rows.items(), key=lambda kv: (places.get(kv[0][0], last), kv[0]))
        )
        lines = [_line(value) for value in [self._header, *self.rows.values()]]
        if read_text(self.path, OutputError) != "".join(lines):
            write_atomically(self.path, "".join(lines))

    def _read(self) -> None:
        """Read all whole lines; a torn last one is cut off."""
        values = whole_lines(self.path)
        try:
            for row in values[1:]:
                self.rows[row["id"], row["repeat"]] = row
        except (KeyError, TypeError) as exc:
            raise OutputError(
                f"{self.path}: is damaged. Remove it, and run the command again."
            ) from exc
        if not values:
            self.path.unlink()


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
