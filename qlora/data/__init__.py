"""Data files -> what the model sees: conversations, token ids, loss masks, and a report of what happened to each row."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import numpy as np

from ..system.errors import InputError
from . import image, labels, preference, tokenized, unpaired
from .encoder import Settings
from .labelled import TEXT, Labelled, LabelledText, Pad
from .labelled_images import KeptImage, LabelledImage, LabelledImages, Pixels, image_sizes
from .masked_examples import IGNORE_INDEX, Example
from .packing import Batches, Packed, Packs, best_fit, dealt_out, joined_parts, micro_batches_of, pack
from .preference import Answers, Pair, Preferences
from .rows import Rows, copies, hold_out, weighted
from .supervised import Supervised
from .unpaired import Mismatched, Unpaired, UnpairedPreferences

__all__ = [
    "IGNORE_INDEX",
    "TEXT",
    "Answers",
    "Batches",
    "Example",
    "KeptImage",
    "Labelled",
    "LabelledImage",
    "LabelledImages",
    "LabelledText",
    "Mismatched",
    "Packed",
    "Packs",
    "Pad",
    "Pair",
    "Pixels",
    "Preferences",
    "Rows",
    "Supervised",
    "Unpaired",
    "UnpairedPreferences",
    "as_supervised",
    "best_fit",
    "conversations",
    "copies",
    "dealt_out",
    "hold_out",
    "image",
    "image_sizes",
    "joined_parts",
    "labels",
    "load",
    "micro_batches_of",
    "pack",
    "preference",
    "report",
    "unpaired",
    "weighted",
]

_BARS = 10  # of the histogram of lengths


def load(source_list, tokenizer, section, seed, encoder=Supervised):
    """Return a tokenized Part for each file that `source_list` (of the recipe's data.train or data.eval) names.

    section: the recipe's data. seed: of the draw where a source has max_rows. encoder: makes an Encoder of a tokenizer
    and Settings; what kind of examples the rows become.

    Raises:
        InputError: a file is missing, broken, or has rows that the recipe does not say to leave out.
    """
    parts = []
    for source in source_list:
        mapped, ignore = source.columns or section.columns, tuple(section.ignore_keys or ())
        encoder.refuse_columns(mapped or {})
        files = encoder.open_source(source, mapped)
        with _saying_that_a_folder_is_read(source, files):
            for file in files:
                header = file.header()
                if header is not None:
                    encoder.refuse_table(file.path, header, mapped, ignore)
        for file, pick in zip(files, _picks(files, source.max_rows, seed), strict=True):
            settings = Settings(
                source.format,
                mapped,
                section.train_on,
                section.max_length,
                section.overlong,
                section.on_bad_row,
                ignore,
                section.thoughts,
                tuple(section.labels or ()),
                file.folder,
            )
            with _saying_that_a_folder_is_read(source, files):
                part = tokenized.tokenize(file, encoder(tokenizer, settings), source.weight, pick, section.num_proc)
            parts.append(part)
    return parts


@contextlib.contextmanager
def _saying_that_a_folder_is_read(source, files):
    """Add to what is wrong with one of several files that they are read because a folder was named."""
    try:
        yield
    except InputError as error:
        if source.path is None or len(files) < 2 or not Path(source.path).is_dir():
            raise
        raise InputError(
            f"{error}\n  it is one of {len(files)} data files of the folder {source.path}, which are all read; name one file, or "
            f"a pattern such as {Path(source.path) / '*.jsonl'}, to read less"
        ) from None


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


def as_supervised(rows):
    """Return Rows where one sequence of ids each is wanted: of pairs the chosen answers, of unpaired answers the good ones."""
    if rows.are_pairs:
        return Answers(rows)
    return unpaired.good_of(rows) if rows.are_unpaired else rows


def conversations(rows):
    """Return the Conversations that the examples of `rows` come from (of pairs those of the chosen answers, of another Encoder
    what it reads), one a row of a file, read from the files again.

    Raises:
        InputError: a file is not what it was.
    """
    rows = rows.one_each()
    found, places = {}, list(zip(rows.part_of.tolist(), *(numbers.tolist() for numbers in rows.places), strict=True))
    for number, part in enumerate(rows.parts):
        wanted = {tuple(place) for of, *place in places if of == number}
        if not wanted:
            continue
        if part.file.digest() != part.digest:
            raise InputError(f"{part.path} changed since it was tokenized; restore it, or start a new run")
        for row in part.file.rows():
            if row.place in wanted:
                found[(number, *row.place)] = part.encoder.read(row.value)[1]
    return [found[place] for place in places]


def report(rows, parts, stops, batches, batches_per_step):
    """Return the contents of data_report.json for the training `rows`.

    parts: the files, held-out ones too. stops: ids that generation stops at; None for rows that teach no words. batches: what a
    step takes batches_per_step of: `rows` themselves, or the Packs or Batches that they were joined into.
    """
    lengths = np.sort(rows.lengths)
    words = {} if stops is None else {"ends_with_stop_token": float(np.isin(rows.last_trained, list(stops)).mean())}
    total = int(lengths.sum())
    return {
        "sources": [
            {
                "path": part.path,
                **{name: value for name, value in part.summary.items() if name != "largest_token"},
                "weight": part.weight,
                "tokens_an_epoch": rows.num_tokens_of(part),
            }
            for part in parts
        ],
        "rows": len(rows),
        "tokens": {"total": total} | ({} if stops is None else {"trained": int(rows.num_trained.sum())}),
        "length": {
            "p50": int(lengths[len(lengths) // 2]),
            "p95": int(lengths[int(len(lengths) * 0.95)]),
            "max": int(lengths[-1]),
            "histogram": _histogram(lengths),
        },
        **words,
        "packing_efficiency": batches.efficiency if isinstance(batches, Packs) else None,
        "steps_per_epoch": -(-len(batches) // batches_per_step),
    }


def _histogram(lengths):
    """Return [[from, to, rows], ...]: how many of `lengths`, an array, lie in each of 10 equal ranges up to the longest."""
    step = -(-int(lengths.max()) // _BARS)
    counts = np.bincount(np.minimum((lengths - 1) // step, _BARS - 1), minlength=_BARS).tolist()
    return [[index * step + 1, (index + 1) * step, count] for index, count in enumerate(counts)]
