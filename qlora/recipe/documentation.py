"""The table of docs/recipe.md, made from the sections and the words beside their fields.

`python -m qlora.recipe.documentation docs/recipe.md` writes it into the page.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from . import Recipe

_TABLE = re.compile(r"\| field \| default \| \|\n(\|.*\n)+")


def table():
    """Return the Markdown table of every field: its name, its default as YAML, and its documentation.

    A field that says what one of that name above says refers to it.
    """
    return "\n".join(["| field | default | |", "|---|---|---|", *_rows(Recipe, "", {})]) + "\n"


def _rows(section, prefix, said):
    """said: {(name, words): the first field of which that is said}; grows."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _rows(inner, f"{name}.", said)
        else:
            words = " ".join((field.description or "").split())
            first = said.setdefault((name, words), f"{prefix}{name}")
            words = words if first == f"{prefix}{name}" else f"as `{first}`"
            yield f"| `{prefix}{name}` | {_default(field)} | {words} |".replace("|  |", "| |")


def _section_of(annotation):
    """Return the section that is of type `annotation`, alone or with null, or None."""
    kinds = [annotation] if get_origin(annotation) is list else [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _default(field):
    value = field.default
    if value is PydanticUndefined:
        return ""
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def write(page):
    """Put the table into the Markdown file `page`, in the place of the one that is there."""
    text = Path(page).read_text(encoding="utf-8")
    Path(page).write_text(_TABLE.sub(lambda _: table(), text, count=1), encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1])
