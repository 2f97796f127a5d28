"""A recipe as a person would write it: the lines that matter, each with its reason as a comment."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from . import Recipe, reading
from .yaml_writing import on_one_line

_COLUMN = 46  # where the reasons begin, unless a value is longer


@dataclass(frozen=True)
class Line:
    """A field of the recipe, dotted, with its value and the reason for it."""

    field: str
    value: Any
    why: str = ""


def values_of(lines) -> dict:
    """Return the nested values that `lines` set; the last one of a field counts."""
    values: dict = {}
    for line in lines:
        section, _, name = line.field.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = line.value
    return values


def overridden(lines, overrides) -> list[Line]:
    """Return `lines` with `section.field=value` strings laid over them, as lines of their own; raises InputError."""
    values, _ = reading.with_overrides("the recipe", values_of(lines), {}, list(overrides))
    for override in overrides:
        parts = override.partition("=")[0].split(".")[:2]
        field, node = ".".join(parts), values
        for part in parts:
            node = node[part]
        near = (f"{field}.", field)
        lines = [one for one in lines if not (f"{one.field}.".startswith(near) or field.startswith(f"{one.field}."))]
        lines.append(Line(field, node, "as given"))
    return lines


def as_text(header, lines, footer=()) -> str:
    """Return `lines` as YAML that reads back to `values_of(lines)`; header, footer: lines of comments, without the #.

    Sections stand in the order of docs/recipe.md.
    """
    by_section: dict[str, list] = {}
    order = list(Recipe.model_fields)
    for line in sorted(lines, key=lambda line: order.index(line.field.partition(".")[0])):
        section, _, name = line.field.rpartition(".")
        by_section.setdefault(section or line.field, []).append((section, name, line))
    found = [_comment(one) for one in header]
    for section, members in by_section.items():
        if members[0][0]:
            found.append(f"{section}:")
        for inner, name, line in members:
            text = f"{'  ' if inner else ''}{name}: {on_one_line(line.value)}"
            found.append(f"{text:<{_COLUMN}}  # {_plain(line.why)}" if line.why else text)
    return "\n".join([*found, *(_comment(one) for one in footer)]) + "\n"


def _comment(text):
    return f"# {_plain(text)}".rstrip()


def _plain(text):
    """Return `text` as a comment may hold it: one line, nothing that nobody sees."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]+", " ", str(text))
