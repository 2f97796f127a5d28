"""What makes examples of rows, and how they lie on disk: the contract. Training has a kind of examples for each kind of rows,
in a file of its own; supervised.py is the first.

What all kinds share knows no more than this: tokenized.py (the cache), tally.py (counts, drops, refusals), rows.py (rows of
several files, held out, weighted).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class Settings:
    """What of the recipe decides what becomes of a row."""

    format: str
    columns: dict | None
    train_on: str
    max_length: int
    overlong: str
    on_bad_row: str
    ignore_keys: tuple = ()
    thoughts: str = "keep"
    labels: tuple = ()
    folder: str = ""  # that of the data file, from which paths in rows start


class TooLong(Exception):
    """The row is left out. args: (what is wrong with this row, the reason to count it under)."""


@dataclass(frozen=True)
class Encoded:
    """What one row became.

    format: of the row. key: 8 bytes, as an unsigned number, that are equal for rows that say the same. examples: one or
    several. unused: keys of the row that are in none of them. counts: {one of the encoder's COUNTS: number}.
    """

    format: str
    key: int
    examples: list
    unused: Iterable[str]
    counts: Mapping[str, int]


class Encoder(Protocol):
    """Rows -> examples of one kind.

    ARRAYS: {name: dtype} of what lies on disk for each token of an example; the token ids are "tokens". NUMBERS: the same of
    what lies there once for each example. COUNTS: names of what is counted of a file's rows. LENGTH: what each example counts
    as; None: its tokens. It is copied into the processes that tokenize.
    """

    ARRAYS: ClassVar[Mapping[str, str]]
    NUMBERS: ClassVar[Mapping[str, str]]
    COUNTS: ClassVar[tuple[str, ...]]
    LENGTH: ClassVar[int | None]
    settings: Settings

    @staticmethod
    def open_source(source, mapped) -> list:
        """Return the data files that one source of the recipe names, such as sources.File. mapped: data.columns, or None."""

    @staticmethod
    def not_read(source) -> list:
        """Return the paths of files that a source of the recipe has, and that are no rows."""

    @staticmethod
    def refuse_columns(mapped) -> None:
        """Raise InputError if data.columns, {known name: column or template}, does not make rows of this kind."""

    @staticmethod
    def refuse_table(path, header, mapped, ignore) -> None:
        """Raise InputError if a table's columns, `header`, lack what a row needs. mapped: data.columns or None; ignore: keys."""

    def identity(self) -> Any:
        """Return, as JSON, what examples depend on beside the row, the settings and this package's code."""

    def read(self, value) -> tuple[str, Any]:
        """Return (format name, what the row says); raises ValueError for what is wrong with it."""

    def encode(self, value) -> Encoded:
        """Return what the row becomes.

        Raises:
            ValueError: what is wrong with it and what is allowed, without file and line.
            TooLong: it is left out for its length.
        """

    def stored(self, example) -> tuple[tuple, tuple]:
        """Return (a list for each of ARRAYS, all of the example's length; a number for each of NUMBERS)."""

    def restored(self, arrays, numbers) -> Any:
        """Return the example that was `stored`. arrays: a NumPy array for each of ARRAYS. numbers: {name: number}, a record."""
