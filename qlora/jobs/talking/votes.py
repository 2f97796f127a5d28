"""Which of two answers is better, voted on blind: the base's or the tuned model's."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from ...evaluation.intervals import wilson
from ...system.errors import InputError
from ...system.files import lines_of
from ...system.storage import add_line

BASE, TUNED, TIE = "base", "tuned", "tie"
SIDES = ("left", "right")


def read(file) -> list[dict]:
    """Return the votes in a file, in their order.

    Raises:
        InputError: the file holds something else.
    """
    file, found = Path(file), []
    try:
        lines = lines_of(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: {error}; give another file with --votes") from None
    for number, line in enumerate(lines, start=1):
        try:
            vote = json.loads(line)
            _ = vote["weights"], {BASE: 0, TUNED: 0, TIE: 0}[vote["winner"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise InputError(
                f"{file} line {number}: not a vote; give another file with --votes, or remove the line"
            ) from None
        found.append(vote)
    return found


class Votes:
    """The votes in a file, a JSON object a line, of one trained model. given: these votes.

    others: how many are in the file of other models, such as the same run before it was trained further; they do not count.
    """

    def __init__(self, file, weights):
        """weights: {file: sha256} of the tuned model, by which a vote says which one it is of.

        Raises:
            InputError: the file holds something else.
        """
        self.file, self._weights = Path(file), weights
        found = read(file) if self.file.exists() else []
        self.given = [vote for vote in found if vote["weights"] == weights]
        self.others = len(found) - len(self.given)

    @property
    def counts(self):
        """{"base", "tuned", "tie": number} of those given."""
        return {who: sum(vote["winner"] == who for vote in self.given) for who in (BASE, TUNED, TIE)}

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
        self.given.append(vote)

    def won(self):
        """Return {"value", "low", "high", "of"}: how often the tuned model won where one did, at 95 %; None: never."""
        counts = self.counts
        decided = counts[BASE] + counts[TUNED]
        if not decided:
            return None
        low, high = wilson(counts[TUNED], decided)
        return {"value": counts[TUNED] / decided, "low": low, "high": high, "of": decided}

    def in_words(self):
        """Return the counts, and what `won` says."""
        counts, won = self.counts, self.won()
        total = sum(counts.values())
        if not total:
            return "no votes yet"
        said = f"{total} vote{'s' * (total != 1)}: tuned {counts[TUNED]}, base {counts[BASE]}, tie {counts[TIE]}"
        if won is None:
            return said
        return (
            f"{said}; the tuned model won {won['value']:.0%} of {won['of']} that were decided "
            f"({won['low']:.0%} to {won['high']:.0%})"
        )


def _of_side(side, left):
    """Return whose answer was on `side`."""
    other = TUNED if left == BASE else BASE
    return left if side == SIDES[0] else other
