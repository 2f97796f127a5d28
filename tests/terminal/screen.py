"""A terminal of few words: what rich writes for a live view, as the lines that a person would see.

Any other command fails the test: a terminal that does not know it would show something else.
"""

import re

_PIECES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


class Terminal:
    """lines: all that is on it, those that have scrolled away too. shows_cursor: as it was asked for last."""

    def __init__(self, width):
        self.width, self.lines, self.row, self.column, self.shows_cursor = width, [""], 0, 0, True

    def feed(self, text):
        end = 0
        for piece in _PIECES.finditer(text):
            assert piece.start() == end, text[end : piece.start()]
            end = piece.end()
            argument, command, carriage, newline, words = piece.groups()
            if command:
                self._obey(argument, command)
            elif carriage:
                self.column = 0
            elif newline:
                self._down()
            elif words:
                self._write(words)

    def _obey(self, argument, command):
        if command == "A":
            self.row -= int(argument or 1)
            assert self.row >= 0
        elif command == "K":
            self.lines[self.row] = ""
        elif command in "hl" and argument == "?25":
            self.shows_cursor = command == "h"
        else:
            assert command == "m", (argument, command)  # colors

    def _down(self):
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.lines):
            self.lines.append("")

    def _write(self, words):
        for letter in words:
            if self.column == self.width:  # it goes on in the next line, as a terminal has it
                self._down()
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
            self.column += 1

    @property
    def text(self):
        return "\n".join(line.rstrip() for line in self.lines)
