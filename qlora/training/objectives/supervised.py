"""The supervised objective: cross entropy of the trained tokens of a conversation, by trl's SFTTrainer.

# B rows, T tokens, N trained positions, V vocabulary
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ... import data
from ...data import IGNORE_INDEX
from ...kernels import loss
from ...system import devices
from ..private_names import on_one_device
from ..reliable_trainer import Reliable
from . import Objective


@dataclass(frozen=True)
class Supervised(Objective):
    """tokenizer: pads. joined: a batch is one row without padding. lean: the loss by kernels.loss. tokens: a joined batch is
    computed as micro-batches of at most so many. parts: processes that share them, see data.joined_parts.

    A batch has what the host must know of it as arrays, which stay on the host: `trained` (B, T), whether a label is trained;
    with padding `lengths` (B). To look for it on a GPU would make the host wait.
    """

    tokenizer: Any
    joined: bool = False
    lean: bool = False
    tokens: int | None = None
    parts: int = 1

    def trainer(self, model, rows, arguments, reliability):
        """rows: training.Rows of sequences of data.Example; those to train on may be data.Packs or data.Batches."""
        settings = SFTConfig(
            **arguments,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=False,  # trl knows all layers or none; kernels.checkpointing takes some
        )
        return Trainer(
            model,
            self,
            dataclasses.replace(reliability, lengths=lengths_of(rows.train, self.joined)),
            args=on_one_device(settings),
            train_dataset=dataset(rows.train),
            eval_dataset=dataset(rows.held_out) if rows.held_out else None,
            processing_class=self.tokenizer,
            data_collator=self.collate,
        )

    def collate(self, rows):
        """Return a batch of `dataset` rows: input_ids and labels (B, T), attention_mask (B, T) where there is padding;
        joined: B = 1, with position_ids and segments. rows: their numbers."""
        numbers = [number for row in rows for number in row["rows"]]
        pad = DataCollatorForLanguageModeling(pad_token_id=self.tokenizer.pad_token_id)
        batch = {**(join_rows if self.joined else pad)(_unbatched(rows)), "rows": numbers}
        if not self.joined:
            batch["lengths"] = batch["attention_mask"].sum(1).numpy()
        return {**batch, "trained": (batch["labels"] != IGNORE_INDEX).numpy()}

    def micro_batches(self, inputs, rows):
        """As data.joined_parts makes them, each in the order of the batch."""
        segments = inputs.get("segments")
        if self.tokens is None or segments is None:
            return [(inputs, rows)]
        parts = data.joined_parts(segments, self.tokens, self.parts)
        return [(inputs, rows)] if len(parts) == 1 else list(_split(inputs, rows, parts))

    def cut(self, inputs, tokens):
        """At least the first row whole."""
        ends = np.cumsum(inputs["segments"])
        tokens = max(tokens, int(ends[0]))
        segments = np.diff(np.minimum(ends, tokens), prepend=0)
        columns = {name: value[:, :tokens] for name, value in inputs.items() if _is_array(value)}
        return {**columns, "segments": segments[segments > 0].tolist()}

    def num_items(self, inputs):
        """The trained tokens."""
        return (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()

    def num_tokens(self, inputs):
        return sum(self.lengths(inputs))

    def lengths(self, inputs):
        return inputs["segments"] if "segments" in inputs else inputs["lengths"].tolist()

    def halves(self, inputs):
        segments = inputs.get("segments")
        many = len(inputs["input_ids"]) if segments is None else len(segments)
        if many < 2:
            return ()
        dim, cut = (0, many // 2) if segments is None else (1, sum(segments[: many // 2]))
        arrays = {name: value for name, value in inputs.items() if _is_array(value)}
        first, second = (
            {name: value[(slice(None),) * dim + (part,)] for name, value in arrays.items()}
            for part in (slice(cut), slice(cut, None))
        )
        if segments is None:
            return first, second
        return first | {"segments": segments[: many // 2]}, second | {"segments": segments[many // 2 :]}

    def loss(self, model, inputs, num_items):
        """trl's where kernels.loss leaves the model to it."""
        if loss.is_left_to_trl(model, self.lean, inputs["labels"].device.type):
            for name in ON_THE_HOST:
                inputs.pop(name, None)
            return None
        return loss_of_trained_positions(model, inputs, num_items, self.lean)


class Trainer(Reliable, SFTTrainer):
    """trl's SFTTrainer, reliable."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # the loss is divided by the tokens of the whole step itself, whatever the model's forward takes: else the mean would
        # be one of micro-batches, divided by a count that only exists once training has begun
        self.model_accepts_loss_kwargs = True


ON_THE_HOST = ("trained", "lengths")  # of a batch, and not for the model


def loss_of_trained_positions(model, inputs, num_items, lean=False):
    """Return the summed cross entropy of the trained tokens over `num_items` (their count if None).

    On a CPU trl 1.16 scores every position, masked ones too, three times over for its metrics. The head alone is a
    fifth of SmolLM2-135M, and answers are under half of the tokens. On a GPU it waits eight times a micro-batch, for masks and
    metrics. Equality with trl's loss is a test.
    lean: by kernels.loss. inputs without `trained`: it is read from the labels.
    """
    scored, targets, head = scored_positions(model, inputs, lean)
    total = (
        loss.cross_entropy(scored, head, targets) if lean else F.cross_entropy(scored.float(), targets, reduction="sum")
    )
    return total / (len(targets) if num_items is None else num_items)


def scored_positions(model, inputs, lean):
    """Return (logits, targets (N), None) of the trained positions of a batch, row by row; lean: (hidden states, targets, head)
    instead."""
    labels, trained = inputs["labels"], inputs.get("trained")
    trained = (labels != IGNORE_INDEX).cpu().numpy() if trained is None else trained
    columns, at, places = _positions(trained, labels.device, "segments" in inputs)
    body = {key: value for key, value in inputs.items() if key not in ("labels", *ON_THE_HOST)}
    head = model.get_base_model().get_output_embeddings() if lean else None
    if lean:
        scored = loss.hidden_states(model, head, columns, **body).flatten(0, 1)
    else:
        scored = model(**body, use_cache=False, logits_to_keep=columns).logits.flatten(0, 1)
    scored = scored if at is None else scored.index_select(0, at)
    return scored, labels.flatten().index_select(0, places), head


def _positions(trained_BT, device, joined):
    """Return (columns, at, places) on `device`: before which labels a row has a trained one; which of (B * columns) positions
    these are, (N), None for all of a joined row; where their labels are, (N) of B * T. One copy, for which nobody waits."""
    rows, before = np.nonzero(trained_BT[:, 1:])
    places = rows * trained_BT.shape[1] + before + 1
    if joined:
        columns, places = devices.sent(np.stack([before, places]), device)
        return columns, None, places
    columns, which = np.unique(before, return_inverse=True)
    sent = devices.sent(np.concatenate([columns, rows * len(columns) + which, places]), device)
    return sent.split([len(columns), len(rows), len(rows)])


# ---- rows to batches -------------------------------------------------------------------------------------------------


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
    given = getattr(examples, "lengths", None)
    return [int(n) for n in given] if given is not None else [len(example.input_ids) for example in examples]


def _unbatched(rows):
    """Return rows of token ids, also where each row is a micro-batch of them."""
    if not isinstance(rows[0]["input_ids"][0], list):
        return rows
    return [
        {"input_ids": ids, "labels": labels}
        for row in rows
        for ids, labels in zip(row["input_ids"], row["labels"], strict=True)
    ]


def _is_array(value):
    return isinstance(value, (torch.Tensor, np.ndarray))


def _split(inputs, rows, parts):
    """Yield (inputs, rows) of each part of joined rows. parts: the places of the rows that each has."""
    segments = inputs["segments"]
    ends = np.cumsum(segments)
    columns = {name: value for name, value in inputs.items() if _is_array(value)}
    pieces = {
        name: [value[:, end - length : end] for end, length in zip(ends, segments, strict=True)]
        for name, value in columns.items()
    }
    for chosen in parts:
        joined = {}
        for name, value in columns.items():
            join = torch.cat if torch.is_tensor(value) else np.concatenate
            joined[name] = join([pieces[name][at] for at in chosen], 1)
        yield {**joined, "segments": [segments[at] for at in chosen]}, [rows[at] for at in chosen] if rows else rows


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
