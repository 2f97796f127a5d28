"""The forms of a served model as files that others read: a table in Markdown and CSV."""

from __future__ import annotations

import csv
import io

from ..system.units import size
from . import markdown

COLUMNS = ["", "size", "tokens/s", "loss", "KL"]
_NUMBERS = ("bytes", "tokens_per_second", "first_token_seconds", "loss", "kl", "message")


def table_of(found) -> list[list[str]]:
    """Return the rows of served.json as text, in the order of COLUMNS."""
    return [
        [
            one["what"],
            "" if one["bytes"] is None else size(one["bytes"]),
            _shown(one["tokens_per_second"], ".1f"),
            _shown(one["loss"], ".4f"),
            _shown(one["kl"], ".1e"),
        ]
        for one in found["forms"]
    ]


def remarks(found) -> list[str]:
    """Return what is to be said of single forms: why they are not there, or not whole."""
    return [f"{one['what']}: {one['message']}" for one in found["forms"] if one["message"]]


def _shown(value, form):
    return "" if value is None else format(value, form)


def as_markdown(found) -> str:
    """Return served.json in Markdown: the command, a table, and what its words mean."""
    lines = markdown.table(COLUMNS, table_of(found))
    more = [f"- {text}" for text in [*remarks(found), *found["notes"]]]
    return "\n".join([f"# {found['run']}, served", "", f"    {found['command']}", "", *lines, "", *more, ""])


def as_csv(found) -> str:
    """Return the forms as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["name", "what", *_NUMBERS])
    for one in found["forms"]:
        writer.writerow([one["name"], one["what"], *(one[name] for name in _NUMBERS)])
    return stream.getvalue()
