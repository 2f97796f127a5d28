"""The objective of tasks with classes: cross entropy of a row's class, by transformers' Trainer. For texts and for images.

L = sum_i w[y_i] * -log softmax(z_i)[y_i] / sum_i w[y_i], over the rows of a step; w = 1 unless data.class_weights says otherwise.

# B rows, T tokens, C classes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch.nn import functional as F

from ..plain_trainer import Numbered, PlainTrainer
from ..private_names import on_one_device
from . import Objective


@dataclass(frozen=True)
class Classification(Objective):
    """pad: makes of a list of examples, which have a `label`, what the model is called with: {name: tensor (B, ...)}, such as
    data.Pad. weights: of each class, None for 1.
    """

    pad: Callable
    weights: tuple | None = None

    def trainer(self, model, rows, arguments, reliability):
        """rows: training.Rows of sequences of examples."""
        return Trainer(
            model,
            self,
            dataclasses.replace(reliability, lengths=lengths_of(rows.train)),
            args=on_one_device(transformers.TrainingArguments(**arguments)),
            train_dataset=Numbered(rows.train),
            eval_dataset=Numbered(rows.held_out) if rows.held_out else None,
            data_collator=self.collate,
        )

    def counts(self):
        return getattr(self.pad, "counts", "tokens")

    def collate(self, rows):
        """Return a batch of Numbered rows: what `pad` makes, labels (B,), and their numbers."""
        numbers, examples = zip(*rows, strict=True)
        labels = torch.tensor([example.label for example in examples])
        return {**self.pad(examples), "labels": labels, "rows": list(numbers)}

    def num_items(self, inputs):
        """The weights of the rows; without weights, their number."""
        labels = inputs["labels"]
        weights = self._weights(labels.device)
        return torch.tensor(float(len(labels)), device=labels.device) if weights is None else weights[labels].sum()

    def num_tokens(self, inputs):
        """Of rows that are no tokens, such as images: the rows."""
        mask = inputs.get("attention_mask")
        return torch.tensor(len(inputs["labels"])) if mask is None else mask.sum()

    def lengths(self, inputs):
        mask = inputs.get("attention_mask")
        return [1] * len(inputs["labels"]) if mask is None else mask.sum(1).tolist()

    def halves(self, inputs):
        many = len(inputs["labels"])
        if many < 2:
            return ()
        arrays = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        return tuple(
            {name: value[part] for name, value in arrays.items()} for part in (slice(many // 2), slice(many // 2, None))
        )

    def loss(self, model, inputs, num_items):
        return self.scored(model, inputs, num_items)[0]

    def scored(self, model, inputs, num_items=None):
        """Return (loss as `loss` has it, logits (B, C) in float32)."""
        labels = inputs["labels"]
        logits_BC = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits.float()
        total = F.cross_entropy(logits_BC, labels, self._weights(labels.device), reduction="sum")
        return total / (self.num_items(inputs) if num_items is None else num_items), logits_BC

    def metrics(self, logs):
        return {"accuracy": logs["eval_accuracy"]} if "eval_accuracy" in logs else {}

    def _weights(self, device):
        return None if self.weights is None else torch.tensor(self.weights, device=device)


class Trainer(PlainTrainer):
    """A PlainTrainer which counts right answers in an evaluation."""

    objective: Classification
    counted = ("right", "answered")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.right = self.answered = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, logits_BC = self.objective.scored(model, inputs)
        self.right = self.right + (logits_BC.argmax(-1) == inputs["labels"]).sum()
        self.answered += len(logits_BC)
        return loss, {"loss": loss}

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self.right = self.answered = 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        right, answered = self.processes.sums([int(self.right), self.answered])
        output.metrics[f"{metric_key_prefix}_accuracy"] = right / max(1, answered)
        return output


def lengths_of(examples):
    """Return the size of each example: its tokens, or 1 where it has none."""
    given = getattr(examples, "lengths", None)
    if given is not None:
        return [int(length) for length in given]
    return [len(getattr(example, "input_ids", (0,))) for example in examples]
