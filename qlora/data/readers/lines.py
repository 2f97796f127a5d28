"""A data file as bytes and as lines, of bounded length and in UTF-8; and the row that all readers yield."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ...system import files
from ...system.errors import InputError

LONGEST = 64 << 20  # bytes or characters of one row: a hundred times what a model can take


class Place(NamedTuple):
    """Where a row stands in its file. row: its number, from 1, where other rows begin on the same line; else 0."""

    line: int
    row: int = 0

    def __str__(self):
        return f"{self.line} (row {self.row})" if self.row else str(self.line)


class Row(NamedTuple):
    """One record: the line it starts on (Parquet and hub: its number), from 1, and what it holds, or what is wrong. row: see
    Place; no two rows of a file have the same place."""

    line: int
    value: Any
    problem: str | None = None
    row: int = 0

    @property
    def place(self):
        return Place(self.line, self.row)


def open_file(path):
    """Return the open file, in bytes; raises InputError where there is none, or it is no data."""
    try:
        return files.open_file(path, "the data file")
    except FileNotFoundError:
        raise InputError(f"no data file at {path} (looked in {Path.cwd()}){files.did_you_mean(path)}") from None


def lines(path, stream):
    """Yield (number, line) of a file, bytes or text; raises InputError where one is longer than any row."""
    number = 0
    while line := stream.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise too_long(path, f"line {number}")
        yield number, line


def too_long(path, place, remedy="split it or remove it"):
    return InputError(f"{path} {place}: longer than {LONGEST >> 20} MiB, too long for one row; {remedy}")


def decoded_lines(file, stream):
    """Yield (number, text of the line), or (number, Row with the problem) where it is not UTF-8."""
    for number, raw in lines(file.path, stream):
        file.done += len(raw)
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield number, Row(number, None, files.not_utf8(error))


def refuse_encoding(path):
    """Raise InputError with the line of the first byte that is not UTF-8."""
    with open_file(path) as stream:
        for number, raw in lines(path, stream):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path} line {number}: {files.not_utf8(error)}") from None
    raise InputError(f"{path}: not UTF-8; save the file as UTF-8")


def first_line(error):
    """Return the first line of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
