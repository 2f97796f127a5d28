"""Plain text."""

from __future__ import annotations

from ...system.errors import InputError
from . import lines


def rows(file):
    """Rows {"text"} of a plain text file: the whole of it, its paragraphs (between blank lines), or its lines."""
    by = file.source.sample_by
    with lines.open_file(file.path) as stream:
        start, held, size = 1, [], 0
        for number, line in lines.decoded_lines(file, stream):
            if isinstance(line, lines.Row):
                raise InputError(f"{file.path} line {number}: {line.problem}")
            if by == "line":
                yield from _text_row(number, [line], by)
            elif by == "paragraph" and not line.strip():
                yield from _text_row(start, held, by)
                start, held, size = number + 1, [], 0
            else:
                held.append(line)
                size += len(line)
                if size > lines.LONGEST:
                    raise lines.too_long(file.path, f"line {start} to {number}", "set sample_by: paragraph, or line")
        yield from _text_row(start, held, by)


def _text_row(line, held, by):
    text = "".join(held)
    if text.strip():
        yield lines.Row(line, {"text": text if by == "document" else text.rstrip("\r\n")})
