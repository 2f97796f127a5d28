"""The rows of a step joined without padding into micro-batches: which sizes there are, and what each makes of the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ... import planner
from ...data import dealt_out, micro_batches_of

_SMALLEST = 512  # tokens; below it a card waits for its memory, whatever the size
_SAMPLE = 20_000  # rows that are joined to see how many micro-batches a step has


@dataclass(frozen=True)
class JoinedSteps:
    """An epoch of such micro-batches. load: the largest one; num_micro_batches: of the epoch, about; num_steps: exactly."""

    load: planner.Load
    num_micro_batches: int
    num_steps: int


def joined_steps(lengths, num_trained, rows, tokens=None, sequences=None, parts=1) -> list[JoinedSteps]:
    """Return what the data can be joined into, the smallest micro-batches first: from the longest row up to a whole step.

    lengths, num_trained: of each row, in tokens. rows: of a step. tokens: of these micro-batches alone, unless a row is longer.
    sequences: where rows are pairs, the length of the longer sequence of each. parts: processes that share a step, of which
    each then has the same part of it at most.
    """
    lengths, num_trained = (np.asarray(numbers, np.int64) for numbers in (lengths, num_trained))
    documents = lengths if sequences is None else np.concatenate([sequences, lengths - sequences])
    longest_first = np.sort(lengths)[::-1][:rows]
    longest, whole = int(lengths.max()), _largest_of(longest_first, parts)
    sizes = {longest, *(2**power for power in range(30) if max(longest, _SMALLEST) <= 2**power < whole), whole}
    sizes |= {_largest_of(longest_first, parts * times) for times in (2, 3, 4, 6, 8) if parts > 1}
    if tokens is not None and tokens >= longest:
        sizes = {min(tokens, whole)}
    num_steps, mean, found = -(-len(lengths) // rows), attended(documents), []
    for size in sorted(sizes):
        scored = _most_trained(lengths, num_trained, rows, size)
        load = planner.Load(
            1, size, scored, joined=True, document=int(documents.max()), attended=mean, alone=size == whole,
            pairs=sequences is not None,
        )  # fmt: skip
        num_micro_batches = round(num_steps * _micro_batches_a_step(lengths, rows, size, parts))
        found.append(JoinedSteps(load, max(num_steps, num_micro_batches), num_steps))
    return found


def attended(lengths):
    """Return how long the document of a token is, in the mean over all tokens."""
    lengths = np.asarray(lengths, float)
    return float((lengths**2).sum() / lengths.sum())


def _most_trained(lengths, num_trained, rows, size):
    """Return how many of `size` tokens are trained at most: those of the rows that have the most, cut where they are full."""
    order = np.argsort(-num_trained / lengths, kind="stable")
    room = np.clip(size - (np.cumsum(lengths[order]) - lengths[order]), 0, lengths[order])
    full = int(np.ceil((num_trained[order] * room / lengths[order]).sum()))
    return max(1, min(full, int(np.sort(num_trained)[::-1][:rows].sum())))


def _largest_of(lengths, parts):
    """Return the tokens of the largest of so many `parts`, dealt out evenly."""
    return int(np.bincount(dealt_out(lengths, parts), weights=lengths).max())


def _micro_batches_a_step(lengths, rows, size, parts):
    """Return the mean number of micro-batches, of some steps drawn at random."""
    shuffled = np.random.default_rng(0).permutation(lengths)
    steps = [shuffled[at : at + rows] for at in range(0, max(rows, min(len(shuffled), _SAMPLE)), rows)]
    return float(np.mean([micro_batches_of(step, size, parts).max() + 1 for step in steps if len(step)]))
