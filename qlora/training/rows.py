"""Examples -> what the Trainer needs: a Dataset of row numbers, examples made on demand, and collators."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from .. import data
from ..data import IGNORE_INDEX


def dataset(items):
    """Return a Dataset of nothing but numbers, whose rows are made of `items` when the trainer asks for them."""
    return Dataset.from_dict({"index": range(len(items))}).with_transform(_Made(items))


class _Made:
    """{"index": numbers} -> the columns of those of `items`: Examples, Packed rows, or lists of Examples."""

    def __init__(self, items):
        self.items = items

    def __getstate__(self):
        return {}  # `datasets` hashes what it is given: it must not read all rows for that

    def __call__(self, batch):
        chosen = [self.items[index] for index in batch["index"]]
        numbers = getattr(self.items, "rows", lambda index: [index])
        rows = {"rows": [numbers(index) for index in batch["index"]]}
        names = ["input_ids", "labels", *(["segments"] if isinstance(chosen[0], data.Packed) else [])]
        if isinstance(chosen[0], list):  # a micro-batch
            return {name: [[getattr(e, name) for e in item] for item in chosen] for name in names} | rows
        return {name: [getattr(item, name) for item in chosen] for name in names} | rows


def lengths_of(examples, joined):
    """Return the tokens of each of `examples`, as many as are computed."""
    if joined and isinstance(examples, data.Batches):
        return examples.real_lengths.tolist()
    return [int(length) for length in getattr(examples, "lengths", map(length, examples))]


def length(example):
    return len(example.input_ids)


def unbatched(rows):
    """Return rows of token ids, also where each row is a micro-batch of them."""
    if not isinstance(rows[0]["input_ids"][0], list):
        return rows
    return [
        {"input_ids": ids, "labels": labels}
        for row in rows
        for ids, labels in zip(row["input_ids"], row["labels"], strict=True)
    ]


def numbered(collate):
    """Return a collator that adds the numbers of the rows, as `rows`: they are for messages, the model does not see them."""
    return lambda rows: {**collate(rows), "rows": [number for row in rows for number in row["rows"]]}


def join_rows(rows):
    """Collate rows into one: no padding, positions from 0 in each document, and the documents' lengths as `segments`."""
    segments = [length for row in rows for length in row.get("segments") or [len(row["input_ids"])]]
    labels = torch.tensor([[label for row in rows for label in row["labels"]]])
    labels[0, np.cumsum([0, *segments[:-1]])] = IGNORE_INDEX  # what stands before it is another document
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in segments])[None],
        "segments": segments,
    }


class ByLength(LengthGroupedSampler):
    """Rows of like length together, in an order that is that of the epoch's number, whenever training began."""

    epoch = 0

    def __init__(self, rows_per_step, lengths, seed):
        super().__init__(rows_per_step, lengths=lengths, generator=torch.Generator())
        self.seed = seed

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()
