"""The result of a verb, on stdout: lines and tables. With --json nobody hears them."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from ..system.events import emit
from .lines import WIDTH, folded

console = Console(highlight=False, emoji=False)


@dataclass(frozen=True)
class Line:
    """A line of a result; a str is folded on a terminal, a rich Text stays whole."""

    text: str | Text


@dataclass(frozen=True)
class Table:
    """A small table; the first column is text, the others numbers. header: names of the columns; rows: lists of str.

    text: all columns are text, and the last is folded.
    """

    title: str
    header: list
    rows: list
    text: bool = False


def show(text):
    emit(Line(text))


def table(title, header, rows):
    emit(Table(title, header, rows))


def text_table(title, header, rows):
    emit(Table(title, header, rows, text=True))


def has_color():
    """True if what is shown can be told apart by color."""
    return console.is_terminal and not console.no_color


def hear(event):
    """Print a Line or Table: on a terminal its text is folded so that it fits; in a file it is whole."""
    if isinstance(event, Line):
        fold = isinstance(event.text, str) and console.is_terminal
        console.print(folded(event.text, console.width) if fold else event.text, markup=False, soft_wrap=True)
    elif isinstance(event, Table):
        hear(Line(event.title))
        if console.is_terminal:
            console.print(_grid(event), end="", width=WIDTH)  # or the window's, if that is less
        else:
            Console(highlight=False, emoji=False, width=1000).print(_grid(event), end="")


def _grid(table):
    grid = Grid(box=box.SIMPLE_HEAD)
    for index, name in enumerate(table.header):
        left, whole = table.text or index == 0, index < len(table.header) - 1 if table.text else index > 0
        grid.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=whole)
    for row in table.rows:
        grid.add_row(*map(Text, row))  # never as markup
    return grid
