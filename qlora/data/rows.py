"""Rows of several files as one sequence of examples, read from disk when asked for: held out, weighted, counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..system.errors import InputError


class Rows(Sequence):
    """Examples of several files, read from disk when asked for. 12 bytes of memory each, whatever their length."""

    def __init__(self, parts, part_of=None, index_in=None):
        self.parts = parts
        if part_of is None:
            counts = [len(part.rows) for part in parts]
            part_of = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
            index_in = np.concatenate([np.arange(count, dtype=np.int64) for count in [*counts, 0]])
        self.part_of, self._index_in = part_of, index_in

    def __len__(self):
        return len(self.part_of)

    def __getitem__(self, index):
        """Return the example at `index`, or the Rows of a slice or an array of indices."""
        if isinstance(index, (slice, np.ndarray)):
            return Rows(self.parts, self.part_of[index], self._index_in[index])
        return self.parts[self.part_of[index]].example(self._index_in[index])

    def where(self, index):
        """Return the file and line of the row that the Example at `index` comes from."""
        return self.parts[self.part_of[index]].where(self._index_in[index])

    @property
    def lengths(self):
        """Tokens of each Example, as an array."""
        return self._gathered(lambda part: part.lengths, np.int64)

    def num_tokens_of(self, part):
        """Return the tokens of the Examples that come from `part`."""
        if part not in self.parts:
            return 0
        return int(part.lengths[self._index_in[self.part_of == self.parts.index(part)]].sum())

    @property
    def are_pairs(self):
        return bool(self.parts) and "split" in self.parts[0].encoder.NUMBERS

    @property
    def are_unpaired(self):
        return bool(self.parts) and "good" in self.parts[0].encoder.NUMBERS

    @property
    def longest(self):
        """Tokens of the longest sequence of each Example, as an array: of a pair, the longer one."""
        lengths = self.lengths
        if not self.are_pairs:
            return lengths
        split = self.numbers("split")
        return np.maximum(split, lengths - split)

    @property
    def largest_token(self):
        return max((part.summary["largest_token"] for part in self.parts), default=0)

    def numbers(self, name, dtype=np.int64):
        """The number `name` of each example, as an array: one of the encoder's NUMBERS, or "line", "row" or "key"."""
        return self._gathered(lambda part: part.rows[name], dtype)

    @property
    def keys(self):
        """A number of each Example that is equal where rows say the same, as an array."""
        return self.numbers("key", np.uint64)

    @property
    def lines(self):
        return self.numbers("line")

    @property
    def places(self):
        """The two numbers of the Place in its file of the row that each Example comes from, as arrays."""
        return self.lines, self.numbers("row")

    @property
    def num_trained(self):
        """Trained tokens of each Example, as an array; 1 of an Example with one label."""
        known = self.parts and "trained" in self.parts[0].encoder.NUMBERS
        return self.numbers("trained") if known else np.ones(len(self), np.int64)

    @property
    def last_trained(self):
        """The last trained token of each Example, as an array; -1 where none is trained."""
        return self.numbers("last")

    def row_numbers(self):
        """Return for each Example the number, from 0, of the row that it comes from; long rows may have several."""
        of_a_row = self.part_of, *self.places
        new = np.logical_or.reduce([numbers[1:] != numbers[:-1] for numbers in of_a_row])
        return np.concatenate([np.zeros(min(1, len(self)), np.int64), np.cumsum(new)])

    def first_rows(self, count):
        """Return the Rows of the first `count` rows of the files."""
        return self[self.row_numbers() < count]

    def one_each(self):
        """Return the Rows without the second and later Examples of one row of a file."""
        return self[np.diff(self.row_numbers(), prepend=-1) > 0]

    def _gathered(self, column, dtype):
        out = np.empty(len(self), dtype)
        for number, part in enumerate(self.parts):
            here = self.part_of == number
            out[here] = column(part)[self._index_in[here]]
        return out


def hold_out(rows, fraction, seed):
    """Return (training Rows, held-out Rows); rows that say the same fall on the same side.

    Raises:
        InputError: nothing would be left to train on.
    """
    if not fraction:
        return rows, rows[:0]
    keys = rows.keys
    distinct = np.unique(keys)
    order = np.random.default_rng(seed).permutation(len(distinct))
    held = distinct[order[: max(1, round(len(distinct) * fraction))]]
    if len(held) == len(distinct):
        raise InputError(f"data.eval_fraction {fraction} leaves no training rows of {len(distinct)} distinct ones")
    is_held = np.isin(keys, held)
    return rows[~is_held], rows[is_held]


def weighted(rows, seed):
    """Return the Rows of one epoch: each source's `weight` times, the fraction of a row being a draw by `seed`."""
    if all(part.weight == 1 for part in rows.parts):
        return rows
    times = np.ones(len(rows), np.int64)
    for number, part in enumerate(rows.parts):
        here = np.flatnonzero(rows.part_of == number)
        again = np.random.default_rng([seed, number]).permutation(len(here)) / max(1, len(here))
        times[here] = np.floor(part.weight + again)
    return rows[np.repeat(np.arange(len(rows)), times)]


def copies(rows, held_out):
    """Return {"duplicates": training rows that repeat another, "eval_rows_in_training": held-out rows trained on}."""
    keys, held = rows.one_each().keys, held_out.one_each().keys
    return {
        "duplicates": int(len(keys) - len(np.unique(keys))),
        "eval_rows_in_training": int(np.isin(held, keys).sum()),
    }
