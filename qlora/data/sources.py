"""Files -> rows, each with its true line number. A strict reader of our own: the Arrow-backed loaders re-type good
rows beside a bad one without a word, and count lines from a block's start."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError


@dataclass(frozen=True)
class Row:
    """One record and where it stands."""

    path: str
    line: int
    value: Any

    @property
    def where(self):
        return f"{self.path} line {self.line}"


def read_rows(path):
    """Return the rows of a JSON array or JSON Lines file, in order; blank lines are passed over.

    Raises:
        InputError: the file is missing, empty or not UTF-8, or lines are not JSON (all of them together).
    """
    path = str(path)
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"no data file at {path} (looked in {Path.cwd()})") from None
    except OSError as error:
        raise InputError(f"cannot read the data file {path}: {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None
    rows = _read_array(path, text) if text.lstrip()[:1] == "[" else _read_lines(path, text)
    if not rows:
        raise InputError(f"{path} has no rows")
    return rows


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
