"""Short rows joined into long ones, so that a micro-batch is full of tokens and not of padding."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .masked_examples import IGNORE_INDEX


@dataclass(frozen=True)
class Packed:
    """Several Examples in one row. segments: their lengths, in order; each is attended to, and counted, by itself."""

    input_ids: list
    labels: list
    segments: list


class Packs(Sequence):
    """Packed rows of at most `capacity` tokens that hold every one of `examples` once; joined when asked for.

    lengths: the tokens of each.
    """

    def __init__(self, examples, lengths, capacity):
        pack_of = best_fit(lengths, capacity)
        self.examples, self.capacity, self.num_tokens = examples, capacity, int(np.sum(lengths))
        self._order = np.argsort(pack_of, kind="stable")
        self._ends = np.cumsum(np.bincount(pack_of)) if len(pack_of) else np.zeros(0, np.int64)
        self.lengths = np.bincount(pack_of, weights=np.asarray(lengths)).astype(np.int64)
        self.longest = int(self.lengths.max(initial=0))

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return _join([self.examples[at] for at in self.rows(index)])

    def rows(self, index):
        """Return the numbers of the examples in pack `index`."""
        begin = self._ends[index - 1] if index % len(self) else 0
        return self._order[begin : self._ends[index]].tolist()

    @property
    def efficiency(self):
        """The share of the rows' room that holds tokens."""
        return self.num_tokens / (len(self) * self.capacity)


class Batches(Sequence):
    """Padded micro-batches (lists of Examples) of at most `tokens`, padding counted, that hold every one of `examples` once.

    Rows of like length share a batch: drawn by `seed` into groups of some hundred batches, sorted by length within those.
    lengths: the tokens of each, padding counted; real_lengths: without.
    """

    def __init__(self, examples, lengths, tokens, seed):
        lengths = np.asarray(lengths, np.int64)
        order = np.random.default_rng(seed).permutation(len(lengths))
        group = max(1, 100 * tokens // max(1, int(lengths.mean())))
        self.examples, self._order, self._begins = examples, order, []
        for start in range(0, len(order), group):
            part = order[start : start + group]
            part = order[start : start + group] = part[np.argsort(-lengths[part], kind="stable")]
            room = 0  # for rows in the batch at hand, as wide as its first, the longest
            for at, length in enumerate(lengths[part].tolist(), start=start):
                if room == 0:
                    self._begins.append(at)
                    room = max(1, tokens // length)
                room -= 1
        begins = np.asarray(self._begins, np.int64)
        self.lengths = lengths[order[begins]] * np.diff(begins, append=len(order))
        self.real_lengths = np.add.reduceat(lengths[order], begins)

    def __len__(self):
        return len(self._begins)

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return [self.examples[at] for at in self.rows(index)]

    def rows(self, index):
        """Return the numbers of the examples in batch `index`."""
        index %= len(self)
        end = self._begins[index + 1] if index + 1 < len(self) else len(self._order)
        return self._order[self._begins[index] : end].tolist()


def best_fit(lengths, capacity):
    """Return the pack number of each of `lengths`, as an array; the lengths of a pack sum to at most `capacity`.

    Best fit decreasing: the longest first, each into the pack that it leaves the least room in. At most 11/9 of the fewest
    packs possible, plus one.

    Source: Johnson et al., Worst-case performance bounds for simple one-dimensional packing algorithms, 1974.
    """
    lengths = np.asarray(lengths, np.int64)
    assert not len(lengths) or lengths.max() <= capacity
    pack_of = np.empty(len(lengths), np.int64)
    rooms: list[int] = []  # sorted, each room that some pack has left
    packs_with: dict[int, list[int]] = {}  # room -> packs that have it
    count = 0
    order = np.argsort(-lengths, kind="stable")
    for index, length in _pairs(order, lengths):
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            pack, room, count = count, capacity, count + 1
        else:
            room = rooms[place]
            pack = packs_with[room].pop()
            if not packs_with[room]:
                del rooms[place], packs_with[room]
        pack_of[index] = pack
        left = room - length
        if left and left not in packs_with:
            bisect.insort(rooms, left)
            packs_with[left] = []
        if left:
            packs_with[left].append(pack)
    return pack_of


def dealt_out(sizes, count):
    """Return, as an array, which of `count` holders each of `sizes` goes to: the largest first, each to the one that has least.

    None has more than a fair share and the largest; at most 4/3 of the least possible (Graham, 1969).
    """
    sizes = np.asarray(sizes)
    holders, holder_of = [(0, holder) for holder in range(count)], np.empty(len(sizes), np.int64)
    for at in np.argsort(-sizes, kind="stable").tolist():
        held, holder = heapq.heappop(holders)
        holder_of[at] = holder
        heapq.heappush(holders, (held + sizes[at].item(), holder))
    return holder_of


def micro_batches_of(lengths, most, parts=1):
    """Return, as an array, which micro-batch each row of a step goes to, so that none has over `most` tokens or one row.

    parts: processes that share the step: their number of micro-batches is a multiple of it, where there are the rows, and they
    are about as long. Alone: as few as best fit makes.
    """
    lengths = np.asarray(lengths, np.int64)
    most = max(most, int(lengths.max()))
    if parts == 1:
        return best_fit(lengths, most)
    for number in range(parts * -(-int(lengths.sum()) // (parts * most)), len(lengths), parts):
        found = dealt_out(lengths, number)
        if np.bincount(found, weights=lengths).max() <= most:
            return found
    return np.arange(len(lengths))


def joined_parts(lengths, most, parts=1):
    """Return [[places]] of the rows of each micro-batch that micro_batches_of makes, in order."""
    part_of = micro_batches_of(lengths, most, parts)
    return [np.flatnonzero(part_of == part).tolist() for part in range(int(part_of.max()) + 1)]


def _pairs(order, lengths):
    """Yield (index, length) in `order`, as Python numbers, which take 8 times the memory: some at a time."""
    for start in range(0, len(order), _PAIRS):
        part = order[start : start + _PAIRS]
        yield from zip(part.tolist(), lengths[part].tolist(), strict=True)


_PAIRS = 1 << 16  # at a time


def pack(examples, capacity):
    """Return the Packs of `examples` (any sequence of them): the same for the same lengths.

    The first token of each document loses its label: what stands before it in the row is another document.
    """
    lengths = getattr(examples, "lengths", None)
    return Packs(examples, [len(e.input_ids) for e in examples] if lengths is None else lengths, capacity)


def _join(examples):
    ids, labels = [], []
    for example in examples:
        ids += example.input_ids
        labels += [IGNORE_INDEX, *example.labels[1:]]
    return Packed(ids, labels, [len(example.input_ids) for example in examples])
