"""Tables in Markdown."""

from __future__ import annotations


def table(header, rows) -> list[str]:
    """Return the lines of a table of texts; a bar in a text stays one."""
    cells = [[text.replace("|", "\\|") for text in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]
