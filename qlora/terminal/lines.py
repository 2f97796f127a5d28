"""Lines for a person, on stderr: folded on a terminal, whole in a file."""

from __future__ import annotations

import re
import textwrap

from rich.console import Console

from ..system.events import Note

console = Console(stderr=True, highlight=False, emoji=False)
WIDTH = 80  # columns of a line on a terminal
_INDENT = " " * 10  # under the words of a line, which begin there
_COMMAND = re.compile(
    r"qlora (?:init|recipes|doctor|plan|data|train|eval|export|compare|report|chat|push|adapters) [^,;`\n]*"
)


def hear(event):
    if isinstance(event, Note):
        say(event.text)


def can_redraw():
    """True where a bar can be drawn over itself: not in a log, of which FORCE_COLOR says that it takes colors, nor on a
    terminal that cannot move back (TERM=dumb, as in an editor)."""
    return console.is_terminal and console.file.isatty() and not console.is_dumb_terminal


def say(text):
    """Print one line, never as markup; folded on a terminal, whole in a file."""
    console.print(folded(text, console.width) if console.is_terminal else text, markup=False, soft_wrap=True)


def folded(text, width=WIDTH):
    """Return `text` in lines of at most 80 columns, or `width` if that is less, with a hanging indent; words and commands,
    to be pasted, stay whole."""
    kept = _COMMAND.sub(lambda command: command[0].replace(" ", "\0"), text)
    lines = [
        textwrap.fill(
            line, min(WIDTH, width), subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False
        )
        for line in kept.split("\n")
    ]
    return "\n".join(lines).replace("\0", " ")
