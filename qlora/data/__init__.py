"""Data files -> what the model sees: conversations, token ids, loss masks, and a report of what happened to each row."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from ..system.errors import InputError
from . import formats, sources, tokenized
from .examples import IGNORE_INDEX, Example
from .packing import Batches, Packed, Packs, pack
from .sources import not_read

__all__ = [
    "IGNORE_INDEX",
    "Batches",
    "Example",
    "Packed",
    "Packs",
    "Rows",
    "conversations",
    "copies",
    "hold_out",
    "load",
    "not_read",
    "pack",
    "report",
    "weighted",
]


class Rows(Sequence):
    """Examples of several files, read from disk when asked for. 12 bytes of memory each, whatever their length."""

    def __init__(self, parts, part_of=None, index_in=None):
        self.parts = parts
        if part_of is None:
            counts = [len(part.rows) for part in parts]
            part_of = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
            index_in = np.concatenate([np.arange(count, dtype=np.int64) for count in [*counts, 0]])
        self._part_of, self._index_in = part_of, index_in

    def __len__(self):
        return len(self._part_of)

    def __getitem__(self, index):
        """Return the Example at `index`, or the Rows of a slice or an array of indices."""
        if isinstance(index, (slice, np.ndarray)):
            return Rows(self.parts, self._part_of[index], self._index_in[index])
        return self.parts[self._part_of[index]].example(self._index_in[index])

    def where(self, index):
        """Return the file and line of the row that the Example at `index` comes from."""
        part = self.parts[self._part_of[index]]
        return f"{part.path} {part.unit} {part.rows['line'][self._index_in[index]]}"

    @property
    def lengths(self):
        """Tokens of each Example, as an array."""
        return self._gathered(lambda part: part.lengths, np.int64)

    def num_tokens_of(self, part):
        """Return the tokens of the Examples that come from `part`."""
        if part not in self.parts:
            return 0
        return int(part.lengths[self._index_in[self._part_of == self.parts.index(part)]].sum())

    @property
    def largest_token(self):
        return max((part.summary["largest_token"] for part in self.parts), default=0)

    @property
    def keys(self):
        """A number of each Example that is equal where rows say the same, as an array."""
        return self._gathered(lambda part: part.rows["key"], np.uint64)

    @property
    def lines(self):
        return self._gathered(lambda part: part.rows["line"], np.int64)

    @property
    def num_trained(self):
        """Trained tokens of each Example, as an array."""
        return self._gathered(lambda part: part.rows["trained"], np.int64)

    @property
    def last_trained(self):
        """The last trained token of each Example, as an array; -1 where none is trained."""
        return self._gathered(lambda part: part.rows["last"], np.int64)

    def _row_numbers(self):
        """Return for each Example the number, from 0, of the row that it comes from; long rows may have several."""
        lines, parts = self.lines, self._part_of
        new = (lines[1:] != lines[:-1]) | (parts[1:] != parts[:-1])
        return np.concatenate([np.zeros(min(1, len(self)), np.int64), np.cumsum(new)])

    def first_rows(self, count):
        """Return the Rows of the first `count` rows of the files."""
        return self[self._row_numbers() < count]

    def one_each(self):
        """Return the Rows without the second and later Examples of one row of a file."""
        return self[np.diff(self._row_numbers(), prepend=-1) > 0]

    def _gathered(self, column, dtype):
        out = np.empty(len(self), dtype)
        for number, part in enumerate(self.parts):
            here = self._part_of == number
            out[here] = column(part)[self._index_in[here]]
        return out


def load(source_list, tokenizer, section, seed):
    """Return a tokenized Part for each file that `source_list` (of the recipe's data.train or data.eval) names.

    section: the recipe's data. seed: of the draw where a source has max_rows.

    Raises:
        InputError: a file is missing, broken, or has rows that the recipe does not say to leave out.
    """
    parts = []
    for source in source_list:
        columns, ignore = source.columns or section.columns, tuple(section.ignore_keys or ())
        formats.refuse_bad_columns(columns or {})
        files = sources.open_source(source)
        for file in files:
            header = file.header()
            if header is not None:
                formats.refuse_table(file.path, header, columns, ignore)
        for file, pick in zip(files, _picks(files, source.max_rows, seed), strict=True):
            settings = tokenized.Settings(
                source.format,
                columns,
                section.train_on,
                section.max_length,
                section.overlong,
                section.on_bad_row,
                ignore,
                section.thoughts,
            )
            parts.append(tokenized.tokenize(file, tokenizer, settings, source.weight, pick, section.num_proc))
    return parts


def _picks(files, max_rows, seed):
    """Return for each file the numbers of the rows to take, or None for all; a draw over all files by `seed`."""
    if max_rows is None:
        return [None] * len(files)
    counts = [sum(1 for _ in file.rows()) for file in files]
    if sum(counts) <= max_rows:
        return [None] * len(files)
    drawn = np.sort(np.array(random.Random(seed).sample(range(sum(counts)), max_rows)))
    ends = np.cumsum(counts)
    return [
        frozenset((drawn[(drawn >= end - n) & (drawn < end)] - (end - n)).tolist())
        for end, n in zip(ends, counts, strict=True)
    ]


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
        here = np.flatnonzero(rows._part_of == number)
        again = np.random.default_rng([seed, number]).permutation(len(here)) / max(1, len(here))
        times[here] = np.floor(part.weight + again)
    return rows[np.repeat(np.arange(len(rows)), times)]


def conversations(rows):
    """Return the Conversations that the Examples of `rows` come from, one a row of a file, read from the files again.

    Raises:
        InputError: a file is not what it was.
    """
    rows = rows.one_each()
    found = {}
    for number, part in enumerate(rows.parts):
        wanted = set(rows.lines[rows._part_of == number].tolist())
        if not wanted:
            continue
        if part.file.digest() != part.digest:
            raise InputError(f"{part.path} changed since it was tokenized; restore it, or start a new run")
        for row in part.file.rows():
            if row.line in wanted:
                found[number, row.line] = tokenized.read(row.value, part.settings)[1]
    return [found[key] for key in zip(rows._part_of.tolist(), rows.lines.tolist(), strict=True)]


def report(rows, parts, stops, batches, batches_per_step):
    """Return the contents of data_report.json for the training `rows`.

    parts: the files, held-out ones too. stops: ids that generation stops at. batches: what a step takes batches_per_step
    of: `rows` themselves, or the Packs or Batches that they were joined into.
    """
    lengths, trained = np.sort(rows.lengths), rows.num_trained
    total = int(lengths.sum())
    return {
        "sources": [
            {
                "path": part.path,
                **_without(part.summary, "largest_token"),
                "weight": part.weight,
                "tokens_an_epoch": rows.num_tokens_of(part),
            }
            for part in parts
        ],
        "rows": len(rows),
        "tokens": {"total": total, "trained": int(trained.sum())},
        "length": {
            "p50": int(lengths[len(lengths) // 2]),
            "p95": int(lengths[int(len(lengths) * 0.95)]),
            "max": int(lengths[-1]),
        },
        "ends_with_stop_token": float(np.isin(rows.last_trained, list(stops)).mean()),
        "packing_efficiency": batches.efficiency if isinstance(batches, Packs) else None,
        "steps_per_epoch": -(-len(batches) // batches_per_step),
    }


def _without(summary, key):
    return {name: value for name, value in summary.items() if name != key}


def copies(rows, held_out):
    """Return {"duplicates": training rows that repeat another, "eval_rows_in_training": held-out rows trained on}."""
    keys, held = rows.one_each().keys, held_out.one_each().keys
    return {
        "duplicates": int(len(keys) - len(np.unique(keys))),
        "eval_rows_in_training": int(np.isin(held, keys).sum()),
    }
