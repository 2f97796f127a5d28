"""JSON Lines, or one JSON array."""

from __future__ import annotations

import codecs
import json

from ...system.errors import InputError
from ..strict_json import DECODER, loads, reason
from . import lines

_BLOCK = 1 << 20
_SPACE = (" ", "\t", "\n", "\r")


def rows(file):
    with lines.open_file(file.path) as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf")
        while not start.strip() and (more := stream.read(4096)):
            start = more
        stream.seek(0)
        if start.lstrip()[:1] == b"[":
            yield from _array_rows(file, stream)
        else:
            yield from _line_rows(file, stream)


def _line_rows(file, stream):
    for number, line in lines.decoded_lines(file, stream):  # not splitlines: U+2028 may stand inside a string
        if isinstance(line, lines.Row):
            yield line
        elif line.strip():
            try:
                yield lines.Row(number, loads(line))
            except ValueError as error:
                if line.strip() == "{":
                    raise InputError(
                        f"{file.path} line {number}: a JSON object that spans several lines; write one array of objects, or "
                        "one object per line (JSON Lines)"
                    ) from None
                yield lines.Row(number, None, f"not valid JSON: {error}; expected one JSON object per line")


def _array_rows(file, stream):
    """Rows of one JSON array, read block by block: no more than a block and the longest row are in memory."""
    buffer = _Buffer(file, stream)
    buffer.peek()
    buffer.skip(1)  # the bracket
    number = before = 0
    try:
        while buffer.peek() != "]":
            line, number, value = buffer.line, number + 1, buffer.value()
            if buffer.peek() not in (",", "]"):
                raise ValueError(f"Expecting ',' or ']' at column {buffer.column()}")
            if buffer.peek() == ",":
                buffer.skip(1)
            is_alone = line != before and (buffer.peek() == "]" or buffer.line != line)
            yield lines.Row(line, value, row=0 if is_alone else number)
            before = line
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file.path} line {buffer.line}: not valid JSON: {reason(error)}") from None
    buffer.skip(1)
    if buffer.peek():
        raise InputError(f"{file.path} line {buffer.line}: there is text after the end of the JSON array")


class _Buffer:
    """A window on a text stream that grows until one JSON value lies in it, and knows its line."""

    def __init__(self, file, stream):
        self.file, self.stream, self.text, self.at, self.line, self.ended = file, stream, "", 0, 1, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.last_line_end = -1

    def more(self, size=_BLOCK):
        """Append a block; return False at the end of the file."""
        raw = self.stream.read(size)
        self.file.done += len(raw)
        try:
            decoded = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError:
            lines.refuse_encoding(self.file.path)
        self.text, self.at, self.last_line_end = self.text[self.at :] + decoded, 0, self.last_line_end - self.at
        self.ended = not raw
        return not self.ended

    def skip(self, count):
        end = self.text.find("\n", self.at, self.at + count)
        while end >= 0:
            self.line, self.last_line_end = self.line + 1, end
            end = self.text.find("\n", end + 1, self.at + count)
        self.at += count

    def peek(self):
        """Return the next character that is no white space, or "" at the end."""
        while True:
            end = self.at
            while self.text[end : end + 1] in _SPACE:
                end += 1
            self.skip(end - self.at)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def column(self):
        return self.at - self.last_line_end

    def value(self):
        self.peek()
        size = _BLOCK
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if cut_off and len(self.text) - self.at > lines.LONGEST:
                    raise lines.too_long(self.file.path, f"line {self.line}") from None
                if not cut_off or not self.more(size):
                    self.skip(error.pos - self.at)
                    raise ValueError(f"{error.msg.removesuffix(' at')} at column {self.column()}") from None
                size *= 2
            else:
                if end < len(self.text) or self.ended or not self.more(size):
                    self.skip(end - self.at)
                    return value
