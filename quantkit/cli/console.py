"""Output beside results: errors, notes, questions, progress."""

import json
import re
import sys
from pathlib import Path
from typing import Any, TextIO
from warnings import formatwarning

from quantkit.cli.expand import with_flags
from quantkit.errors import CacheWarning, InputError
from quantkit.progress import Progress, Stage
from quantkit.units import size

OPTIONS: dict[str, str] = {}  # parameter -> option of all commands


def error(message: str) -> None:
    """Print one line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def note(message: str | None) -> None:
    """Print a note on stderr, with fields as options; nothing for None."""
    if message is not None:
        print(f"note: {with_flags(message, OPTIONS)}", file=sys.stderr)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print our own warnings as notes, and all others as Python does."""
    if issubclass(category, CacheWarning):
        note(str(message))
    else:
        print(
            formatwarning(message, category, filename, lineno, line),
            end="",
            file=file or sys.stderr,
        )


def print_json(value: Any) -> None:
    """Print a result on stdout, for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def record(out: Path, **fields: Any) -> None:
    """Set fields of a repo's report and card. Raises OutputError."""
    from quantkit.publish.record import record as put

    if not put(out, **fields):
        note(f"{out}/README.md was edited by hand and stays; quantkit.json has the new values.")


class Bars(Progress):
    """Progress bars with ETA on stderr, one per stage. Use as a context manager.

    Bars appear on a terminal only, and vanish at the end.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        screen = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.fields[title]}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.description}", style="dim", markup=False),
            console=screen,
            disable=not screen.is_terminal,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stage(self, title: str, total: int, unit: str = "bytes") -> Stage:
        """Add a bar; a total of 0 shows the current item only."""
        task = self._bars.add_task("", total=total or None, title=title, amount="")
        done = 0

        def advance(more: int, name: str) -> None:
            nonlocal done
            done += more
            amount = f"{done}/{total} {unit}" if unit != "bytes" else f"{size(done)}/{size(total)}"
            amount = amount if total else ""
            self._bars.update(task, advance=more, description=_short(name), amount=amount)

        return advance

    def note(self, text: str) -> None:
        """Print a note above the bars."""
        note(text)


def require_yes(question: str, option: str, otherwise: str) -> None:
    """Ask the user for confirmation. Raises InputError if the answer is no, or without a
    terminal.
    """
    if not sys.stdin.isatty():
        raise InputError(f"{question} Without a terminal, confirm with {option}.")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InputError(otherwise)


def _short(name: str) -> str:
    """Return `layer 5 v_proj` for `model.layers.5.self_attn.v_proj`."""
    layer = re.search(r"\.(\d+)\.", name)
    return f"layer {layer[1]} {name.removesuffix('.weight').rpartition('.')[2]}" if layer else name
