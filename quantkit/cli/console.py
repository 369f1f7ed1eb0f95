"""What a person sees beside results: errors, notes, questions, progress."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from warnings import formatwarning

from quantkit.errors import CacheWarning, InputError
from quantkit.progress import Progress


def error(message: str) -> None:
    """One line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def note(message: str | None) -> None:
    """A line on stderr that is no result; nothing for None."""
    if message is not None:
        print(f"note: {message}", file=sys.stderr)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show our own warnings as notes, without the line of code that gave them; all others as
    Python does."""
    if issubclass(category, CacheWarning):
        note(str(message))
    else:
        print(
            formatwarning(message, category, filename, lineno, line),
            end="",
            file=file or sys.stderr,
        )


def print_json(value: Any) -> None:
    """A result on stdout, for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def record(out: Path, **found: Any) -> None:
    """Put what was found into a repo's report and card. Raises OutputError."""
    from quantkit.publish.report import record as put

    if not put(out, **found):
        note(f"{out}/README.md is not as quantkit drew it: it is left, quantkit.json has it all.")


@contextmanager
def progress(total: int, what: str, unit: str = "bytes") -> Iterator[Progress]:
    """A progress bar on stderr over `total` bytes or steps, with ETA; only on a terminal, gone at
    the end.

    With a total of 0 only the names of what is being done are shown.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    done = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    counted = (BarColumn(bar_width=16), done, TimeRemainingColumn())
    columns = (
        TextColumn(what, markup=False),
        *(counted if total else ()),
        TextColumn("{task.description}", style="dim", markup=False),
    )
    screen = Console(stderr=True)
    bar = Progress(
        *columns,
        console=screen,
        disable=not screen.is_terminal,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task("", total=total or None)
        yield lambda done, name: bar.update(task, advance=done, description=_short(name))


def require_yes(question: str, option: str, otherwise: str) -> None:
    """Go on only if a person says yes. Raises InputError if not (`otherwise`), or where nobody can
    be asked."""
    if not sys.stdin.isatty():
        raise InputError(f"{question} Nobody can be asked here; {option} says yes.")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InputError(otherwise)


def _short(name: str) -> str:
    """`layer 5 v_proj` for `model.layers.5.self_attn.v_proj`."""
    layer = re.search(r"\.(\d+)\.", name)
    return f"layer {layer[1]} {name.removesuffix('.weight').rpartition('.')[2]}" if layer else name
