"""Classes that a model gives to held-out rows: logits, loss, how many are right, and which are taken for which.

# N rows, C classes
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from ..system.events import progress
from . import answer_metrics, intervals
from .answer_metrics import AnswerMetric
from .scores import Score

_ROWS = 32  # that go through the model together


@torch.no_grad()
def logits_of(model, pad, examples, what="classifying"):
    """Return the logits (N, C) of a model, float32 on the CPU, in the order of `examples`.

    pad: makes a batch of examples, such as data.Pad. Rows of like length share a batch, whatever their order.
    """
    order = sorted(range(len(examples)), key=lambda index: _size(examples[index]))
    found: list = [None] * len(examples)
    with progress(what, len(examples), "rows") as advance:
        for start in range(0, len(order), _ROWS):
            numbers = order[start : start + _ROWS]
            batch = pad([examples[index] for index in numbers])
            logits_BC = model(**{name: value.to(model.device) for name, value in batch.items()}).logits.float().cpu()
            for index, logits_C in zip(numbers, logits_BC, strict=True):
                found[index] = logits_C
            advance(len(numbers))
    return torch.stack(found)


def _size(example):
    return len(getattr(example, "input_ids", ()))


def score(logits_NC, labels_N, names) -> Score:
    """Return the Score of logits and the numbers of the right classes: accuracy, and macro F1 over the classes that rows have or
    answers name. The loss is the cross entropy in nats a row, all rows alike."""
    right = np.asarray(labels_N)
    losses = F.cross_entropy(logits_NC, torch.as_tensor(right), reduction="none").double().numpy()
    answers, references = (
        [names[number] for number in numbers] for numbers in (logits_NC.argmax(-1).tolist(), right.tolist())
    )
    metrics: dict[str, AnswerMetric] = {name: answer_metrics.named(name, names) for name in ("accuracy", "macro_f1")}
    parts = {name: answer_metrics.parts(metric, answers, references) for name, metric in metrics.items()}
    return Score(np.stack([losses, np.ones(len(right))], 1), answers, references, metrics, parts, per_token=False)


def details(score: Score, names) -> dict:
    """Return {"per_class", "confusion"} of a Score of classes.

    per_class: [{"label", "rows", "precision", "recall", "f1"}]. confusion: [[rows]], a line for each right class, a column for
    each answer.
    """
    numbers = {name: number for number, name in enumerate(names)}
    right, answers = (np.array([numbers[name] for name in texts]) for texts in (score.references, score.answers))
    confusion_CC = np.bincount(right * len(names) + answers, minlength=len(names) ** 2).reshape(len(names), len(names))
    per_class = [{"label": name, **_of_class(confusion_CC, number)} for number, name in enumerate(names)]
    return {"per_class": per_class, "confusion": confusion_CC.tolist()}


def of_majority(labels_N, number):
    """Return {"value", "low", "high"}: the accuracy of who always answers with class `number`."""
    right = int((np.asarray(labels_N) == number).sum())
    return intervals.with_interval(right / len(labels_N), *intervals.wilson(right, len(labels_N)))


def _of_class(confusion_CC, number):
    """Return {"rows", "precision", "recall", "f1"} of one class; a share of nothing is 0."""
    right, answered, rows = confusion_CC[number, number], confusion_CC[:, number].sum(), confusion_CC[number].sum()
    return {
        "rows": int(rows),
        "precision": float(right / answered) if answered else 0.0,
        "recall": float(right / rows) if rows else 0.0,
        "f1": float(2 * right / (answered + rows)) if answered + rows else 0.0,
    }
