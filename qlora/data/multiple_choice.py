"""Rows of questions with choices, as MMLU has them: what is asked, what can be answered, and which of it is right.

JSON Lines, a JSON array or Parquet with `question`, `choices` (a list of texts) and `answer` (a letter, or the number from 0); or
a table with the columns question, A, B, C, D, answer (a letter), where the header may be missing as in MMLU's own files.
`subject` is optional. Other keys are left out.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from string import ascii_uppercase as LETTERS

from ..system.errors import InputError
from .message import kind_of, refuse_surrogates
from .readers import table
from .readers.lines import Place
from .sources import File


@dataclass(frozen=True)
class Question:
    """One row. line, row: where it stands in its file, see Place. answer: the number of the right choice, from 0."""

    line: int
    text: str
    choices: tuple[str, ...]
    answer: int
    subject: str | None = None
    row: int = 0

    @property
    def place(self):
        return Place(self.line, self.row)


def read(path) -> list[Question]:
    """Return the Questions of a file, in order.

    Raises:
        InputError: there is no such file, or all that is wrong with its rows together, each with its line.
    """
    file = File(str(path), None)
    found, problems = [], []
    for row in table.rows(file, columns=_columns(file)) if file.suffix in table.SEPARATORS else file.rows():
        try:
            if row.problem is not None:
                raise ValueError(row.problem)
            found.append(_question(row))
        except ValueError as error:
            problems.append(f"{file.unit} {row.place}: {error}")
    if problems:
        remedy = "a row of choices has `question`, `choices` (a list of texts) and `answer`; see docs/evaluation.md"
        raise InputError.listing(str(path), problems, remedy)
    if not found:
        raise InputError(f"{path} has no rows")
    return found


def _columns(file):
    """Return the names of a table's columns where its first line is a row already, as in MMLU's own files; else None."""
    if not (header := _first(file)) or {"question", "answer"} & {*header}:
        return None
    letters = LETTERS[: len(header) - 2]
    return ["question", *letters, "answer"] if len(letters) > 1 and header[-1].strip().upper() in {*letters} else None


def _first(file):
    try:
        with open(file.path, encoding="utf-8-sig", newline="") as stream:
            return next(csv.reader(stream, delimiter=table.separator(file)), None)
    except (OSError, UnicodeDecodeError, csv.Error):
        return None  # what is wrong is said on reading


def _question(row) -> Question:
    value = row.value
    if not isinstance(value, dict):
        raise ValueError(f"not an object but {kind_of(value)}")
    if missing := [name for name in ("question", "answer") if name not in value]:
        raise ValueError(f"no {' and no '.join(missing)}; it has {', '.join(map(str, value)) or 'nothing'}")
    choices = value["choices"] if "choices" in value else _by_letter(value)
    if not isinstance(choices, (list, tuple)) or len(choices) < 2:
        raise ValueError(f"choices: {kind_of(choices)}; write a list of two texts or more")
    if len(choices) > len(LETTERS):
        raise ValueError(f"choices: {len(choices)} of them; there are letters for {len(LETTERS)}")
    for name, text in (("question", value["question"]), *((f"choices[{n}]", one) for n, one in enumerate(choices))):
        if not isinstance(text, str):
            raise ValueError(f"{name}: {kind_of(text)}; write a text")
        if not text.strip():
            raise ValueError(f"{name}: empty")
        refuse_surrogates(name, text)
    subject = value.get("subject") or None
    if not isinstance(subject, (str, type(None))):
        raise ValueError(f"subject: {kind_of(subject)}; write a text")
    return Question(
        row.line, value["question"], tuple(choices), _number(value["answer"], len(choices)), subject, row.row
    )


def _by_letter(value):
    """Return the choices of a row that has them in columns A, B, C and so on."""
    found = []
    for letter in LETTERS:
        if letter not in value:
            break
        found.append(value[letter])
    if not found:
        raise ValueError(f"no choices, and no A, B, C; it has {', '.join(map(str, value))}")
    return found


def _number(answer, many):
    letters = LETTERS[:many]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < many:
        return answer
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return letters.index(answer.strip().upper())
    raise ValueError(
        f"answer: {answer!r}; write a letter from A to {letters[-1]}, or in JSON a number from 0 to {many - 1}"
    )
