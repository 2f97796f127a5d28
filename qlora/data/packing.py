"""Short rows joined into long ones, so that a micro-batch is full of tokens and not of padding."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from .chat import IGNORE_INDEX


@dataclass(frozen=True)
class Packed:
    """Several Examples in one row. segments: their lengths, in order; each is attended to, and counted, by itself."""

    input_ids: list
    labels: list
    segments: list

    @property
    def num_trained(self):
        return sum(label != IGNORE_INDEX for label in self.labels)


def best_fit(lengths, capacity):
    """Return lists of indices into `lengths`, each list's lengths summing to at most `capacity`.

    Best fit decreasing: the longest first, each into the row that it leaves the least room in. At most 11/9 of the fewest
    rows possible, plus one.

    Source: Johnson et al., Worst-case performance bounds for simple one-dimensional packing algorithms, 1974.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # sorted, the room left in some row
    at: dict[int, list[int]] = {}  # room -> rows that have it
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert length <= capacity
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms.pop(place)
            row = at[room].pop()
        rows[row].append(index)
        bisect.insort(rooms, room - length)
        at.setdefault(room - length, []).append(row)
    return rows


def alone(example):
    """Return the Example as a Packed row with one document."""
    return Packed(example.input_ids, example.labels, [len(example.input_ids)])


def pack(examples, capacity):
    """Return Packed rows of at most `capacity` tokens that hold every Example once, in an order that is always the same.

    The first token of each document loses its label: what stands before it in the row is another document.
    """
    return [
        _join([examples[index] for index in row]) for row in best_fit([len(e.input_ids) for e in examples], capacity)
    ]


def _join(examples):
    ids, labels = [], []
    for example in examples:
        ids += example.input_ids
        labels += [IGNORE_INDEX, *example.labels[1:]]
    return Packed(ids, labels, [len(example.input_ids) for example in examples])
