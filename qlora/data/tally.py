"""What became of the rows of one file: counted, dropped with a reason, or refused with their lines."""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass, field

from ..system.errors import InputError
from . import columns

SHOWN = 20  # bad or dropped rows that are named; the rest are counted
_ALIKE = 3  # rows with the same problem that are shown in full


@dataclass
class _Alike:
    """Refused rows with the same kind of problem: how many, and (Place, what is wrong) of the first."""

    count: int = 0
    first: list = field(default_factory=list)


class Tally:
    """Counts what became of the rows of one file."""

    def __init__(self, encoder):
        settings = encoder.settings
        self.names_of_counts = encoder.COUNTS
        self.refuses_bad, self.refuses_long = settings.on_bad_row == "error", settings.overlong == "error"
        self.rows = self.not_picked = self.num_refused = self.num_too_long = self.largest_token = 0
        self.counts: collections.Counter = collections.Counter()
        self.unused, self.missing = collections.Counter(), columns.optional(settings.columns)
        self.formats, self.reasons = collections.Counter(), collections.Counter()
        self.refused: dict = {}  # kind of problem: _Alike
        self.dropped: list = []  # (Place, text): the first of them

    def add(self, result):
        """Count what became of a chunk of rows, a tokenized.Chunk."""
        self.rows += result.rows
        self.counts += result.counts
        self.formats += result.formats
        self.unused += result.unused
        self.missing -= result.columns
        if "tokens" in result.arrays:
            self.largest_token = max(self.largest_token, int(result.arrays["tokens"].max(initial=0)))
        for place, text in result.bad:
            self._leave_out(place, text, _sort_of(text), self.refuses_bad)
        for place, text, reason in result.too_long:
            self.num_too_long += self.refuses_long
            self._leave_out(place, text, reason, self.refuses_long)

    def _leave_out(self, place, text, reason, refused):
        if refused:
            self.num_refused += 1
            kind = _sort_of(text)
            if kind in self.refused or len(self.refused) < SHOWN:
                same = self.refused.setdefault(kind, _Alike())
                same.count += 1
                same.first += [(place, text)] if len(same.first) < 2 * _ALIKE else []
        else:
            self.reasons[reason] += 1
            self.dropped += [(place, text)] if len(self.dropped) < SHOWN else []

    def refuse(self, path, unit):
        """Raise InputError if there are rows that the recipe does not say to leave out."""
        if not self.num_refused:
            return
        remedies = []
        if self.num_too_long:
            remedies.append("raise data.max_length, or set data.overlong to drop, truncate_prompt, truncate or split")
        if self.num_refused > self.num_too_long:
            remedies.append("fix these rows, or skip them with data.on_bad_row=skip")
        lines = self._problems(unit)
        more = self.num_refused - sum(count for count, _ in lines)
        raise InputError.listing(
            path, [text for _, text in lines], "; ".join(remedies), total=self.num_refused, more=more
        )

    def _problems(self, unit):
        """Return [(number of rows, what is wrong with them), ...] in order: one for each of the first _ALIKE rows with a kind of
        problem, and one for all the others of that kind."""
        found = []
        for same in self.refused.values():
            found += [(place, 1, f"{unit} {place}  {text}") for place, text in same.first[:_ALIKE]]
            rest = [place for place, _ in same.first[_ALIKE:]]
            if rest:
                more = same.count - _ALIKE
                places = ", ".join(map(str, rest)) + (", ..." if more > len(rest) else "")
                found.append(
                    (rest[0], more, f"{unit}{'s' if len(rest) > 1 else ''} {places}  likewise ({more:,} rows)")
                )
        return [(count, text) for _, count, text in sorted(found)[:SHOWN]]

    def refuse_missing_columns(self, path):
        """Raise InputError if a column that rows may lack is in none of them."""
        if self.missing and self.rows:
            raise InputError(
                f"{path}: no row has {', '.join(map(repr, sorted(self.missing)))}, which data.columns names; "
                "correct the name or remove it"
            )

    def summary(self, unit):
        """Return the counts as a JSON object."""
        left_out = sum(self.reasons.values())
        reasons = dict(self.reasons.most_common())
        if self.not_picked:
            reasons["not in the sample of max_rows"] = self.not_picked
        return {
            "format": ", ".join(
                f"{name} {count:,}" if len(self.formats) > 1 else name for name, count in self.formats.most_common()
            ),
            "rows_read": self.rows + self.not_picked,
            "rows_kept": self.rows - left_out,
            "rows_dropped": left_out + self.not_picked,
            **{key: self.counts[key] for key in self.names_of_counts},
            "reasons": reasons,
            "unused": dict(sorted(self.unused.items(), key=lambda item: (-item[1], item[0]))),
            "largest_token": self.largest_token,
            "dropped_rows": [{"row": f"{unit} {place}", "reason": text} for place, text in self.dropped],
        }


def _sort_of(text):
    """Return the reason without what is special to one row: numbers, and what is quoted."""
    return re.sub(r"\d+", "N", re.sub(r"(?<!\w)'[^']*'", "'...'", text))[:120]
