"""A model that answers with classes on held-out rows: its scores, those before its training, and the class of a text."""

from __future__ import annotations

import numpy as np
import torch

from ... import base_model, data
from ...data.encoder import Settings
from ...evaluation import classes
from ...system.errors import InputError
from ..opening.chosen_task import encoder_of, pad_of


def labels_of(subject):
    """Return the names of the classes of a Subject."""
    return base_model.task_of(subject.model).labels_of(subject.model.config)


def score_of_classes(subject, rows, what="classifying"):
    """Return the Score of a Subject on data.Rows. what: the progress is of."""
    labels, pad = list(labels_of(subject)), pad_of(subject.tokenizer, subject.model)
    logits_NC = classes.logits_of(subject.model, pad, rows, what)
    return classes.score(logits_NC, rows.numbers(data.labels.COLUMN), labels)


def details(subject, rows, after) -> dict:
    """Return {"labels", "per_class", "confusion"} of a Subject's Score of data.Rows.

    Of a run also "majority": {"label", "accuracy"} of who always answers the class that most of its training rows have.
    """
    labels = list(labels_of(subject))
    found = {"labels": labels, **classes.details(after, labels)}
    if subject.run is not None:
        report = subject.run.data_report()
        most = int(np.argmax([one["rows"] for one in report["classes"]]))
        right = rows.numbers(data.labels.COLUMN)
        found["majority"] = {"label": labels[most], "accuracy": classes.of_majority(right, most)}
    return found


def classes_of_text(subject, text) -> dict:
    """Return {class: probability} of one text, the likeliest first; raises InputError for a text that cannot be classified."""
    labels = labels_of(subject)
    settings = Settings("auto", None, "assistant", 2**30, "error", "error", labels=labels)
    encoder = encoder_of(base_model.task_of(subject.model).NAME)(subject.tokenizer, settings)
    try:
        [example] = encoder.encode({data.TEXT: text, data.labels.COLUMN: labels[0]}).examples
    except ValueError as error:
        raise InputError(str(error)) from None
    limit = base_model.num_positions(subject.model.config)
    if limit is not None and len(example.input_ids) > limit:
        raise InputError(f"the text is too long: {len(example.input_ids):,} tokens, the model has {limit:,} positions")
    [logits_C] = classes.logits_of(subject.model, pad_of(subject.tokenizer, subject.model), [example])
    probabilities = torch.softmax(logits_C, -1).tolist()
    pairs = sorted(zip(labels, probabilities, strict=True), key=lambda pair: -pair[1])
    return dict(pairs)
