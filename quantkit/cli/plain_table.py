"""Plain tables, which fit any terminal."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Column, Table

_LEAST_TEXT = 14  # characters of a heading, or a column of text, over several lines
_BETWEEN = 2  # characters between two columns


def plain_table(*columns: str) -> "Table":
    """Return a plain table; a leading # aligns a column right and keeps its cells whole."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for column in columns:
        number = column.startswith("#")
        table.add_column(
            Text(column.removeprefix("#")),
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
        )
    return table


def print_table(table: "Table", title: str | None = None) -> None:
    """Print a table.

    On a narrow terminal headings take several lines, and a table that is still too wide is printed
    in pieces that repeat the first column.
    """
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if title:
        print(title)
    for piece in _parts_that_fit(table, console.width):
        console.print(piece)
        print()


def _parts_that_fit(table: "Table", width: int) -> "Iterator[Table]":
    """Yield tables of some of the columns of `table`, which together hold all of them."""
    from rich.text import Text

    columns = table.columns
    if _width(columns, _longest_line) > width:
        for column in columns:
            if column.no_wrap:
                column.header = Text("\n".join(wrap(str(column.header), _LEAST_TEXT)))
    groups = [columns[:1]]
    for column in columns[1:]:
        if len(groups[-1]) > 1 and _width([*groups[-1], column], _least_width) > width:
            groups.append(columns[:1])
        groups[-1].append(column)
    for group in groups:
        piece = plain_table()
        piece.columns = [replace(column, _index=number) for number, column in enumerate(group)]
        piece.rows = table.rows
        yield piece


def _width(columns: Sequence["Column"], of_one: Callable[["Column"], int]) -> int:
    return sum(of_one(column) + _BETWEEN for column in columns) - _BETWEEN


def _longest_line(column: "Column") -> int:
    cells = (str(cell) for cell in (column.header, *column.cells))
    return max((len(line) for cell in cells for line in cell.splitlines()), default=0)


def _least_width(column: "Column") -> int:
    longest = _longest_line(column)
    return longest if column.no_wrap else min(longest, _LEAST_TEXT)
