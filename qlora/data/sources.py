"""Files -> rows, each with its true place. Strict readers of our own for text formats: the Arrow-backed loaders re-type
good rows beside a bad one without a word, and count lines from a block's start."""

from __future__ import annotations

import csv
import glob
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (".json", ".jsonl", ".parquet", *_SEPARATORS)


@dataclass(frozen=True)
class Row:
    """One record and where it stands: the line of a text file, or the number of a row in a Parquet file, from 1."""

    path: str
    line: int
    value: Any
    unit: str = "line"

    @property
    def place(self):
        return f"{self.unit} {self.line}"

    @property
    def where(self):
        return f"{self.path} {self.place}"


def expand(path):
    """Return the files that `path` names, sorted: a file, a glob, or a folder (every data file in it).

    Raises:
        InputError: there is none.
    """
    if Path(path).is_dir():
        found = sorted(str(file) for file in Path(path).iterdir() if file.suffix in _SUFFIXES)
        if not found:
            raise InputError(f"the folder {path} holds no {', '.join(_SUFFIXES)} file")
        return found
    if Path(path).exists() or not glob.has_magic(str(path)):
        return [str(path)]
    found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if not found:
        raise InputError(f"no data file matches {path} (looked in {Path.cwd()})")
    return found


def read_rows(path):
    """Return the rows of a JSON array, JSON Lines, CSV, TSV or Parquet file, in order; blank lines are passed over.

    Raises:
        InputError: the file is missing, empty, cut off or not UTF-8, or lines are malformed (all of them together).
    """
    path = str(path)
    suffix = Path(path).suffix
    try:
        rows = _read_parquet(path) if suffix == ".parquet" else _read_text(path, suffix)
    except FileNotFoundError:
        raise InputError(f"no data file at {path} (looked in {Path.cwd()})") from None
    except OSError as error:
        raise InputError(f"cannot read the data file {path}: {error.strerror or error}") from None
    if not rows:
        raise InputError(f"{path} has no rows")
    return rows


def _read_text(path, suffix):
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None
    if suffix in _SEPARATORS:
        return _read_table(path, text, _SEPARATORS[suffix])
    return _read_array(path, text) if text.lstrip()[:1] == "[" else _read_lines(path, text)


def _read_table(path, text, separator):
    """Rows of a table with a header; every value is a string. A quoted field may hold separators and line ends."""
    rows, problems, header, line = [], [], None, 1
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for fields in reader:
            start, line = line, reader.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = fields
                if len(set(header)) != len(header):
                    raise InputError(f"{path} line {start}: a column name stands twice in the header")
            elif len(fields) != len(header):
                problems.append(f"line {start}  {len(fields)} fields, the header has {len(header)}")
            else:
                rows.append(Row(path, start, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        problems.append(f"line {line}  {error}")
    if problems:
        raise InputError.listing(path, problems)
    return rows


def _read_parquet(path):
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            values = (value for batch in file.iter_batches() for value in batch.to_pylist())
            return [Row(path, number, value, "row") for number, value in enumerate(values, start=1)]
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a whole Parquet file: {error}") from None


def _read_lines(path, text):
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if line.strip():
            try:
                rows.append(Row(path, number, _loads(line)))
            except ValueError as error:
                problems.append(f"line {number}  not valid JSON: {error}; each line holds one object")
    if problems:
        raise InputError.listing(path, problems)
    return rows


def _read_array(path, text):
    rows, position = [], text.index("[") + 1
    line, counted = text.count("\n", 0, position) + 1, position
    try:
        while True:
            position = _skip_space(text, position)
            if text[position : position + 1] == "]":
                break
            line, counted = line + text.count("\n", counted, position), position
            value, position = _DECODER.raw_decode(text, position)
            rows.append(Row(path, line, value))
            position = _skip_space(text, position)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position += text[position] == ","
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} line {getattr(error, 'lineno', line)}: not valid JSON: {_reason(error)}") from None
    if text[position + 1 :].strip():
        raise InputError(f"{path} line {line}: there is text after the end of the JSON array")
    return rows


def _skip_space(text, position):
    while text[position : position + 1] in _SPACE:
        position += 1
    return position


def _no_duplicates(pairs):
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in one object"
        )
    return value


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


_SPACE = (" ", "\t", "\n", "\r")
_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def _loads(line):
    try:
        return _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(_reason(error)) from None


def _reason(error):
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
