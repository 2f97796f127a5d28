"""Classes that a model gives to held-out rows: logits, loss, and how many are right, with intervals of 95 %.

# N rows, C classes
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from ..system.events import progress

_ROWS = 32  # that go through the model together
_DRAWS = 1000  # of the bootstrap
_Z = 1.959964  # of 95 %


@torch.no_grad()
def logits_of(model, pad, examples, what="classifying", rows_at_once=_ROWS):
    """Return the logits (N, C) of a model, float32 on the CPU, in the order of `examples`.

    pad: makes a batch of examples, such as data.Pad. Rows of like length share a batch, whatever their order.
    """
    order = sorted(range(len(examples)), key=lambda index: _size(examples[index]))
    found: list = [None] * len(examples)
    with progress(what, len(examples), "rows") as advance:
        for start in range(0, len(order), rows_at_once):
            numbers = order[start : start + rows_at_once]
            batch = pad([examples[index] for index in numbers])
            logits_BC = model(**{name: value.to(model.device) for name, value in batch.items()}).logits.float().cpu()
            for index, logits_C in zip(numbers, logits_BC, strict=True):
                found[index] = logits_C
            advance(len(numbers))
    return torch.stack(found)


def _size(example):
    return len(getattr(example, "input_ids", ()))


def score(logits_NC, labels_N, names):
    """Return {"loss", "metrics", "per_class", "confusion"} of logits and the numbers of the right classes.

    loss: the mean cross entropy in nats a row, all rows alike. metrics: {name: {"value", "low", "high"}} of accuracy (Wilson's
    interval) and macro_f1, the mean over the classes that have rows (an interval of 1,000 draws of rows).
    confusion: [[rows]], a line for each right class, a column for each answer.
    """
    answers, right = logits_NC.argmax(-1).numpy(), np.asarray(labels_N)
    confusion_CC = _confusion(right, answers, len(names))
    per_class = [{"label": name, **_of_class(confusion_CC, number)} for number, name in enumerate(names)]
    return {
        "loss": F.cross_entropy(logits_NC, torch.as_tensor(right)).item(),
        "metrics": {
            "accuracy": wilson(int(np.trace(confusion_CC)), len(right)),
            "macro_f1": _interval_of_f1(right, answers, len(names)),
        },
        "per_class": per_class,
        "confusion": confusion_CC.tolist(),
    }


def of_majority(labels_N, number):
    """Return the interval of accuracy of who always answers with class `number`."""
    right = np.asarray(labels_N)
    return wilson(int((right == number).sum()), len(right))


def _confusion(right, answers, num_classes):
    return np.bincount(right * num_classes + answers, minlength=num_classes**2).reshape(num_classes, num_classes)


def _of_class(confusion_CC, number):
    """Return {"rows", "precision", "recall", "f1"} of one class; a share of nothing is 0."""
    right, answered, rows = confusion_CC[number, number], confusion_CC[:, number].sum(), confusion_CC[number].sum()
    return {
        "rows": int(rows),
        "precision": float(right / answered) if answered else 0.0,
        "recall": float(right / rows) if rows else 0.0,
        "f1": float(2 * right / (answered + rows)) if answered + rows else 0.0,
    }


def macro_f1(right, answers, num_classes):
    """Return the mean F1 over the classes that rows have or answers name, as scikit-learn's f1_score(average="macro")."""
    confusion_CC = _confusion(right, answers, num_classes)
    both = confusion_CC.sum(0) + confusion_CC.sum(1)
    there = both > 0
    return float((2 * np.diag(confusion_CC)[there] / both[there]).mean())


def _interval_of_f1(right, answers, num_classes):
    draws = np.random.default_rng(0).integers(0, len(right), (_DRAWS, len(right)))
    values = [macro_f1(right[rows], answers[rows], num_classes) for rows in draws]
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return {"value": macro_f1(right, answers, num_classes), "low": low, "high": high}


def wilson(right, count):
    """Return {"value", "low", "high"}: the share right / count and Wilson's interval of 95 % for it."""
    share, z = right / count, _Z
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return {"value": share, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}
