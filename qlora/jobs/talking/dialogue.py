"""A conversation with a model: what was said, taken back, and saved as a row to train on."""

from __future__ import annotations

from pathlib import Path

from ...data import formats
from ...system.errors import InputError
from ...system.storage import add_line


class Dialogue:
    """system: the system message, None for none. turns: [(question, answer)]."""

    def __init__(self, system=None):
        self.system, self.turns = system, []

    def messages(self, question=None):
        """Return it as messages, as a chat template takes them; `question` at their end."""
        found = [] if self.system is None else [_message("system", self.system)]
        for asked, answer in self.turns:
            found += [_message("user", asked), _message("assistant", answer)]
        return found if question is None else [*found, _message("user", question)]

    def undo(self):
        """Take back the last question and its answer; return the question.

        Raises:
            InputError: there is none.
        """
        if not self.turns:
            raise InputError("no question was asked yet")
        return self.turns.pop()[0]

    def save(self, path):
        """Add the conversation to the file `path` as one more row, {"messages": [...]}, which can be trained on.

        Raises:
            InputError: nothing was answered, the file is of another kind, or it cannot be written to.
        """
        path = Path(path).expanduser()
        if path.suffix != ".jsonl":
            raise InputError(f"{path}: a conversation becomes a line of JSON; name a file that ends in .jsonl")
        if not self.turns:
            raise InputError("there is no answer yet, so there is nothing to save")
        row = {"messages": self.messages()}
        try:
            formats.read(row)
        except ValueError as error:
            raise InputError(f"nothing was saved, as it could not be trained on: {error}") from None
        try:
            add_line(path, row)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; nothing was saved") from None


def _message(role, content):
    return {"role": role, "content": content}
