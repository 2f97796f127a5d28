"""qlora data: what the model will see, before any weight is read."""

from __future__ import annotations

import numpy as np
from rich.text import Text

from ..data import IGNORE_INDEX
from ..errors import InputError
from ..recipe import Recipe
from . import console
from .prepared import prepare, refuse_pointless, say_report

_BARS = 10


def inspect_data(recipe: Recipe, row=None, tokens=False) -> dict:
    """Print rows read and dropped, lengths, the share of tokens trained, and rendered rows; return data_report.json.

    row: the number of the one training row to render, from 1; by default the first two. tokens: show each token's id.

    Raises:
        InputError: the recipe or the data is wrong, nothing is left to train on, or there is no such row.
    """
    prepared = prepare(recipe)
    if row is not None and not 1 <= row <= len(prepared.examples):
        raise InputError(f"--row {row}: there are rows 1 to {len(prepared.examples)}")
    say_report(prepared)
    for line in _histogram(prepared.examples.lengths, recipe.data.max_length):
        console.show(line)
    steps = prepared.report["steps_per_epoch"]
    console.show(f"steps     {steps:,} an epoch")
    for number in range(1, min(2, len(prepared.examples)) + 1) if row is None else [row]:
        where = prepared.examples.where(number - 1)
        console.show(
            f"\nrow {number} ({where}); {'trained tokens in green' if console.has_color() else 'trained: [[...]]'}"
        )
        console.show(_rendered(prepared.tokenizer, prepared.examples[number - 1], tokens))
    refuse_pointless(prepared.report)
    return prepared.report


def _histogram(lengths, max_length):
    """Return lines that draw how many rows have which length, up to the longest."""
    step = -(-int(lengths.max()) // _BARS)
    counts = np.bincount(np.minimum((lengths - 1) // step, _BARS - 1), minlength=_BARS).tolist()
    lines = [f"lengths   of {len(lengths):,} rows; max_length is {max_length:,}"]
    for index, count in enumerate(counts):
        bar = "#" * round(40 * count / max(counts))
        lines.append(f"  {index * step + 1:>7,} - {(index + 1) * step:<7,} {bar} {count:,}")
    return lines


def _rendered(tokenizer, example, with_ids):
    """Return the row as it is trained, special tokens visible, trained tokens marked."""
    text = Text()
    for trained, ids in _runs(example):
        for piece_ids in [[token] for token in ids] if with_ids else [ids]:
            piece = tokenizer.decode(piece_ids, skip_special_tokens=False)
            piece = f"{piece!r}:{piece_ids[0]} " if with_ids else piece
            if trained and not console.has_color():
                piece = f"[[{piece}]]"
            text.append(piece, style="bold green" if trained else "dim")
    return text


def _runs(example):
    """Yield (trained or not, token ids) for each longest run of one kind."""
    run, kind = [], None
    for token, label in zip(example.input_ids, example.labels, strict=True):
        trained = label != IGNORE_INDEX
        if run and trained != kind:
            yield kind, run
            run = []
        run.append(token)
        kind = trained
    yield kind, run
