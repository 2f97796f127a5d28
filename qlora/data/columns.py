"""data.columns: rows whose keys have other names, or need words around them, -> rows of a known format."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache

from ..system.errors import InputError
from . import formats
from .message import is_empty, kind_of


def read(value, columns=None, only="auto", ignore=()):
    """Return (format name, Conversation) of a row as it stands in a file.

    columns, only: the recipe's data.columns and format. ignore: keys, of the row or of a message, that are not used.

    Raises:
        ValueError: what is wrong with the row and what is allowed, without file and line.
    """
    name, conversation = formats.read(renamed(value, columns), only, ignore)
    if not columns:
        return name, conversation
    mapped = set().union(*map(mentioned, columns.values()))
    rest = {key: inner for key, inner in value.items() if key not in mapped and not is_empty(inner)}
    said = {key: inner for key, inner in rest.items() if key not in ignore}
    if mapped.isdisjoint(formats.PREFERENCE):  # who maps `chosen` means to train on it
        formats.refuse_pair(said)
    formats.refuse_verdict(said, name)
    return name, replace(conversation, unused=tuple(sorted({*conversation.unused, *rest})))


def renamed(value, columns):
    """Return the row with only the fields that `columns` ({known name: column, or a Jinja template of columns}) names.

    Raises:
        ValueError: the row has no such column, or the template fails on it.
    """
    if not columns:
        return value
    if not isinstance(value, dict):
        raise ValueError(f"data.columns needs rows with columns, this is {kind_of(value)}")
    missing = [
        column
        for name, column in columns.items()
        if name not in formats.OPTIONAL and not is_template(column) and column not in value
    ]
    if missing:
        raise ValueError(f"has no column {', '.join(map(repr, missing))}; it has {', '.join(map(str, value))}")
    return {
        name: _fill(column, value) if is_template(column) else _text(name, value[column])
        for name, column in columns.items()
        if is_template(column) or column in value
    }


def unused(value, columns):
    """Return the keys of a row that are in none of `columns` and not empty, in order."""
    used = set().union(*map(mentioned, columns.values()))
    return tuple(sorted(str(key) for key, inner in value.items() if key not in used and not is_empty(inner)))


def refuse_other_names(mapped, known, rows):
    """Raise InputError where data.columns (`mapped`) names something that `rows`, in words, do not have, or a template of it."""
    refuse_no_template(mapped)
    useless = [name for name in mapped if name not in known]
    if useless:
        raise InputError(f"data.columns.{useless[0]}: {rows} have {', '.join(known)}, not {', '.join(useless)}")


def refuse_missing(path, header, columns, remedy):
    """Raise InputError where a table lacks one of `columns`. remedy: what to name, a sentence."""
    wanted = set().union(*(needed(column) for column in columns.values()))
    missing = sorted(wanted.difference(header))
    if missing:
        raise InputError(f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(header)}. {remedy}")


def optional(columns):
    """Return the columns that a row may lack; one that every row of a file lacks is a mistake in the recipe."""
    return {column for name, column in (columns or {}).items() if name in formats.OPTIONAL and not is_template(column)}


def is_template(column):
    return "{{" in column or "{%" in column


def _text(name, value):
    """A label of 0 or 1 is a fine answer; what the known shape wants as a list stays one. Not a number is none."""
    if _is_nan(value):
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if number and name in formats.WORDS else value


@cache
def compiled(column):
    """Return the Jinja template `column`; raises jinja2.TemplateError if it is none."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=_said
    ).from_string(column)


def _said(value):
    """Return what a template writes for a value: nothing for a null, or for the NaN that a table has for a missing number."""
    return "" if value is None or _is_nan(value) else value


def _is_nan(value):
    return isinstance(value, float) and math.isnan(value)


@cache
def mentioned(column):
    """Return the names of the columns that the value `column` of data.columns reads."""
    from jinja2 import Environment, meta

    return meta.find_undeclared_variables(Environment().parse(column)) if is_template(column) else {column}


def refuse_bad(columns):
    """Raise InputError if a value of `columns` is meant as a Jinja template, and is none, or if no shape has use for all
    that is mapped."""
    refuse_no_template(columns)
    if not columns:
        return
    try:
        shape = formats.detect(columns)
    except ValueError:
        raise InputError(
            f"data.columns maps {', '.join(columns)}: not enough for a row; map {formats.SHAPES}"
        ) from None
    takes = formats.FORMATS[shape].USED
    useless = [name for name in columns if name not in takes]
    if useless:
        raise InputError(
            f"data.columns.{useless[0]}: rows of format {shape} do not use {', '.join(useless)}; "
            f"they take {', '.join(takes)}"
        )


def refuse_no_template(columns):
    """Raise InputError if a value of `columns` is meant as a Jinja template, and is none."""
    import jinja2

    for name, column in columns.items():
        try:
            compiled(column) if is_template(column) else None
        except jinja2.TemplateError as error:
            raise InputError(f"data.columns.{name}: {column!r} is not a Jinja template: {error}") from None


def refuse_table(path, header, columns, ignore):
    """Raise InputError if the table's columns, `header`, lack what data.columns names, or fit no shape."""
    named = set().union(*map(needed, (columns or {}).values()))
    missing = sorted(named.difference(header))
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(map(repr, missing))}, which data.columns names; it has {', '.join(header)}"
        )
    if not columns:
        try:
            formats.detect([name for name in header if name not in ignore], "columns")
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None


def needed(column):
    """Return the columns without which a row has not what the value `column` asks for; none of a template that says what it
    does without."""
    says = is_template(column) and re.search(r"\bdefined\b|\bdefault\b", column)
    return set() if says else mentioned(column)


def _fill(column, value):
    import jinja2

    try:
        return compiled(column).render(value)
    except (jinja2.TemplateError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"the template {column!r} of data.columns fails: {error}") from None
