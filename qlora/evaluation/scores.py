"""A model on held-out rows: its loss, its answers, how many of them are right, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import data
from ..data import masked_examples
from ..system.errors import InputError
from . import answer_metrics, generate, intervals, metrics
from .answer_metrics import AnswerMetric
from .asked import Asked
from .intervals import ratio, with_interval

LOSS, PERPLEXITY, BITS_PER_BYTE = intervals.OF_LOSS


@dataclass(frozen=True)
class Score:
    """What was measured on N rows.

    loss_N2: (nats, trained tokens) of each; without per_token (nats, 1). answers, references: N texts, empty where rows are
    plain text. metrics: by name. parts: {name of a metric: (N, K)}, see answer_metrics. bytes_N: of the trained text, in UTF-8.
    """

    loss_N2: np.ndarray
    answers: Sequence[str] = ()
    references: Sequence[str] = ()
    metrics: Mapping[str, AnswerMetric] = field(default_factory=dict)
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    per_token: bool = True
    bytes_N: np.ndarray | None = None

    def of_loss(self) -> dict[str, tuple[Callable, np.ndarray]]:
        """Return {name: (function of sums, (N, 2) parts)} of the loss and what follows from it."""
        found: dict[str, tuple[Callable, np.ndarray]] = {LOSS: (ratio, self.loss_N2)}
        if self.per_token:
            found[PERPLEXITY] = (_perplexity, self.loss_N2)
        if self.bytes_N is not None and self.bytes_N.all():  # else a resample may have none
            found[BITS_PER_BYTE] = (ratio, np.stack([self.loss_N2[:, 0] / math.log(2), self.bytes_N], 1))
        return found

    def to_json(self) -> dict:
        """Return {"loss", "loss_interval", "metrics": {name: {"value", "low", "high"}}}; of words the same of
        "perplexity" and "bits_per_byte", and "tokens"."""
        found: dict[str, Any] = {}
        for name, (value, parts) in self.of_loss().items():
            found[name] = value(intervals.summed(parts))
            found[f"{name}_interval"] = list(intervals.interval(value, parts))
        if self.per_token:
            found["tokens"] = int(self.loss_N2[:, 1].sum())
        found["metrics"] = {
            name: with_interval(
                metric.value(intervals.summed(self.parts[name])),
                *intervals.interval(metric.value, self.parts[name]),
            )
            for name, metric in self.metrics.items()
        }
        return found

    def since(self, before: Score) -> dict:
        """Return {name: {"value", "low", "high"}} of the change of each number from `before`, which is of the same rows."""
        then = before.of_loss()
        of = {name: (value, then[name][1], parts) for name, (value, parts) in self.of_loss().items()}
        of |= {name: (metric.value, before.parts[name], self.parts[name]) for name, metric in self.metrics.items()}
        return {name: intervals.change(*value_then_now) for name, value_then_now in of.items()}


def _perplexity(sums):
    return metrics.perplexity(ratio(sums))


def score(model, tokenizer, stops, rows, conversations, asked=Asked(), what="answering") -> Score:  # noqa: B008 (frozen)
    """Return the Score of a model on `rows`, data.Rows.

    conversations: those that the rows come from, one each; plain text has no question, and so no answer. Loss is in nats a
    trained token; answers are greedy. stops: ids that end an answer. what: the progress is of.

    Raises:
        InputError: there is nothing that `asked` can be measured on.
        DoesNotFit: there is no memory for one answer by itself.
    """
    has_answers = all(conversation.messages for conversation in conversations)
    if not has_answers and (asked.metrics or asked.extract or asked.judge_url):
        option = "--metric" if asked.metrics else "--extract" if asked.extract else "--judge"
        raise InputError(f"{option} is for answers, and the rows are plain text without answers; leave it out")
    losses, numbers = np.zeros((len(conversations), 2)), rows.row_numbers()
    np.add.at(losses, numbers, np.array(metrics.losses(model, rows)))
    sizes = np.zeros(len(conversations), int)
    np.add.at(sizes, numbers, [_bytes(tokenizer, example) for example in rows])
    if not has_answers:
        return Score(losses, bytes_N=sizes)
    prompts = [prompt_of(tokenizer, conversation) for conversation in conversations]
    references, cut = [reference_of(tokenizer, conversation) for conversation in conversations], asked.cut or str
    expected = list(map(cut, references))
    if asked.extract is not None and not any(expected):
        raise InputError(f"--extract {asked.extract!r} finds nothing in any of the {len(references)} expected answers")
    most = most_tokens(tokenizer, references)
    answers = generate.answers(model, tokenizer, prompts, stops, most, batch_size=asked.rows_together, what=what)
    compared = list(map(cut, answers)), expected
    chosen = answer_metrics.fitting(expected)
    chosen |= {name: answer_metrics.named(name, expected) for name in asked.metrics}
    parts = {name: answer_metrics.parts(metric, *compared) for name, metric in chosen.items()}
    return Score(losses, answers, references, chosen, parts, bytes_N=sizes)


def forgetting(model, rows, adapted) -> dict:
    """Return {"after", "tokens"}: the loss on `rows` that were not trained on, nats a token; where a model is `adapted`, with
    its loss "before", and the rise since then as {"value", "low", "high"}."""
    after = np.array(metrics.losses(model, rows))
    found = {"after": ratio(intervals.summed(after)), "tokens": int(after[:, 1].sum())}
    if not adapted:
        return found
    with model.disable_adapter():
        before = np.array(metrics.losses(model, rows))
    return found | {"before": ratio(intervals.summed(before))} | intervals.change(ratio, before, after)


def prompt_of(tokenizer, conversation):
    """Return the token ids of what a conversation asks before its last answer."""
    return masked_examples.encode_prompt(tokenizer, conversation.messages[:-1], conversation.tools)


def reference_of(tokenizer, conversation):
    """Return the last answer as the model has to write it, calls of tools in the template's form."""
    example = masked_examples.encode(tokenizer, replace(conversation, flags=()), "last_assistant")[-1]
    return tokenizer.decode(_trained(example)[:-1], skip_special_tokens=True)


def most_tokens(tokenizer, references):
    """Return how many tokens an answer may have: 16 more than the longest that is expected."""
    return max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in references) + 16


def _bytes(tokenizer, example):
    """Return the bytes of the text that is trained of an example, in UTF-8; tokens that end an answer are none."""
    return len(tokenizer.decode(_trained(example), skip_special_tokens=True).encode())


def _trained(example):
    return [label for label in example.labels if label != data.IGNORE_INDEX]
