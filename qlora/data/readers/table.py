"""CSV and TSV files."""

from __future__ import annotations

import csv
import re

from ...system.errors import InputError
from . import lines

SEPARATORS = {".csv": ",", ".tsv": "\t"}
_OTHERS = ";\t|"  # of .csv files; a spreadsheet with a decimal comma writes semicolons
_DECLARED = re.compile('"?sep=(.)"?\r?\n?')  # a first line for Excel, which is no row
_QUOTES = 'a quote within a quoted field is written twice (""), and a field that begins with one ends with one'


def separator(file):
    """Return the character between the fields of a table: that of its suffix, one that its first line declares, or that its
    header has instead."""
    usual = SEPARATORS[file.suffix]
    with open(file.path, encoding="utf-8-sig", errors="replace", newline="") as stream:
        first = next((line for _, line in lines.lines(file.path, stream) if line.strip()), "")
    if declared := _DECLARED.fullmatch(first):
        return declared[1]
    if file.suffix != ".csv" or len(_fields(first, usual)) > 1:
        return usual
    return next((other for other in _OTHERS if len(found := _fields(first, other)) > 1 and all(found)), usual)


def _fields(line, delimiter):
    return next(csv.reader([line], delimiter=delimiter), [])


def header(file):
    """Return the columns that every row has; None for what `rows` has to explain."""
    return next((row.value for row in rows(file, names=True)), None)


def rows(file, names=False, columns=None):
    """Rows of a table with a header; every value is a string. A quoted field may hold separators and line ends. names:
    the header alone, as a row. columns: their names, of a table without a header."""
    path, header, line = file.path, columns, 1
    csv.field_size_limit(lines.LONGEST)
    lines.open_file(path).close()
    with open(path, encoding="utf-8-sig", newline="") as stream:
        try:
            delimiter = separator(file)
            reader = csv.reader(_counted(file, stream), delimiter=delimiter, strict=True)
            for fields in reader:
                start, line = line, reader.line_num + 1
                declares = start == 1 and fields in (["sep=", ""], [f"sep={delimiter}"])
                if declares or not any(value.strip() for value in fields):
                    continue
                if header is None:
                    header = fields
                    if len(set(header)) != len(header):
                        raise InputError(f"{path} line {start}: duplicate column name in the header")
                    if names:
                        yield lines.Row(start, header)
                        return
                elif len(fields) != len(header):
                    yield lines.Row(start, None, f"{len(fields)} fields, the header has {len(header)}")
                else:
                    yield lines.Row(start, dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            raise InputError(f"{path} line {line}: {error}; cannot tell where this row ends; {_QUOTES}") from None
        except UnicodeDecodeError:
            lines.refuse_encoding(path)


def _counted(file, stream):
    for _, line in lines.lines(file.path, stream):
        file.done += len(line)
        yield line
