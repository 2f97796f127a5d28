"""Which of two answers is better, voted on blind: the base's or the tuned model's."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from ..evaluation.intervals import wilson
from ..system.errors import InputError
from ..system.storage import add_line

BASE, TUNED, TIE = "base", "tuned", "tie"
SIDES = ("left", "right")


class Votes:
    """The votes in a file, a JSON object a line, of one trained model. counts: {"base", "tuned", "tie": number}.

    others: how many are in the file of other models, such as the same run before it was trained further; they do not count.
    """

    def __init__(self, file, weights):
        """weights: {file: sha256} of the tuned model, by which a vote says which one it is of.

        Raises:
            InputError: the file holds something else.
        """
        self.file, self._weights = Path(file), weights
        self.counts, self.others = dict.fromkeys((BASE, TUNED, TIE), 0), 0
        if not self.file.exists():
            return
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{self.file}: {error}; give another file with --votes") from None
        for number, line in enumerate(lines, start=1):
            try:
                vote = json.loads(line)
                self._count(vote["winner"], vote["weights"] == weights)
            except (ValueError, LookupError, TypeError):
                raise InputError(
                    f"{self.file} line {number}: not a vote; give another file with --votes, or remove the line"
                ) from None

    def add(self, asked, left, answers, better):
        """Write one vote down. asked: what was asked, and how. left: BASE or TUNED, whose answer was there. answers: of both, by
        these names. better: "left", "right" or TIE.

        Raises:
            InputError: the file cannot be written to.
        """
        winner = TIE if better == TIE else _of_side(better, left)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        vote = {
            "time": now,
            "weights": self._weights,
            **asked,
            "left": left,
            "better": better,
            "winner": winner,
            "answers": answers,
        }
        try:
            add_line(self.file, vote)
        except OSError as error:
            raise InputError(f"{self.file}: {error.strerror}; the vote was not kept") from None
        self._count(winner, True)

    def _count(self, winner, ours):
        if ours:
            self.counts[winner] += 1
        else:
            self.others += 1

    def in_words(self):
        """Return the counts, and how often the tuned model won where one did, with its interval of 95 %."""
        total, decided = sum(self.counts.values()), self.counts[BASE] + self.counts[TUNED]
        if not total:
            return "no votes yet"
        said = f"{total} vote{'s' * (total != 1)}: tuned {self.counts[TUNED]}, base {self.counts[BASE]}, tie {self.counts[TIE]}"
        if not decided:
            return said
        low, high = wilson(self.counts[TUNED], decided)
        return (
            f"{said}; the tuned model won {self.counts[TUNED] / decided:.0%} of {decided} that were decided "
            f"({low:.0%} to {high:.0%})"
        )


def _of_side(side, left):
    """Return whose answer was on `side`."""
    other = TUNED if left == BASE else BASE
    return left if side == SIDES[0] else other
