"""A model on held-out rows: its loss, its answers, how many of them are right, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .. import data
from ..data import masked_examples
from ..system.errors import InputError
from . import answer_metrics, generate, intervals, metrics
from .answer_metrics import AnswerMetric
from .asked import Asked
from .intervals import with_interval

LOSS = "loss"


@dataclass(frozen=True)
class Score:
    """What was measured on N rows.

    loss_N2: (nats, trained tokens) of each; without per_token (nats, 1). answers, references: N texts, empty where rows are
    plain text. metrics: by name.
    parts: {name of a metric: (N, K)}, see answer_metrics.
    """

    loss_N2: np.ndarray
    answers: Sequence[str] = ()
    references: Sequence[str] = ()
    metrics: Mapping[str, AnswerMetric] = field(default_factory=dict)
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    per_token: bool = True

    def to_json(self) -> dict:
        """Return {"loss", "loss_interval", "metrics": {name: {"value", "low", "high"}}}; of words "perplexity", "tokens" too."""
        loss = mean(intervals.summed(self.loss_N2))
        num_tokens = int(self.loss_N2[:, 1].sum())
        of_words = {"perplexity": metrics.perplexity(loss), "tokens": num_tokens} if self.per_token else {}
        return {
            "loss": loss,
            "loss_interval": list(intervals.interval(mean, self.loss_N2)),
            **of_words,
            "metrics": {
                name: with_interval(
                    metric.value(intervals.summed(self.parts[name])),
                    *intervals.interval(metric.value, self.parts[name]),
                )
                for name, metric in self.metrics.items()
            },
        }

    def since(self, before: Score) -> dict:
        """Return {"loss" or a metric: {"value", "low", "high"}} of the change from `before`, which is of the same rows."""
        of = {LOSS: (mean, before.loss_N2, self.loss_N2)}
        of |= {name: (metric.value, before.parts[name], self.parts[name]) for name, metric in self.metrics.items()}
        return {name: intervals.change(*value_then_now) for name, value_then_now in of.items()}


def mean(sums):
    """Return the ratio of two sums: nats a token."""
    return float(sums[0] / sums[1])


def score(model, tokenizer, stops, rows, conversations, asked=Asked(), what="answering") -> Score:  # noqa: B008 (frozen)
    """Return the Score of a model on `rows`, data.Rows.

    conversations: those that the rows come from, one each; plain text has no question, and so no answer. Loss is in nats a
    trained token; answers are greedy. stops: ids that end an answer. what: the progress is of.
    """
    losses = np.zeros((len(conversations), 2))
    np.add.at(losses, rows.row_numbers(), np.array(metrics.losses(model, rows)))
    if not all(conversation.messages for conversation in conversations):
        return Score(losses)
    prompts = [
        masked_examples.encode_prompt(tokenizer, conversation.messages[:-1], conversation.tools)
        for conversation in conversations
    ]
    references = [_reference(tokenizer, conversation) for conversation in conversations]
    longest = max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in references)
    answers = generate.answers(
        model, tokenizer, prompts, stops, max_new_tokens=longest + 16, batch_size=asked.batch_size, what=what
    )
    cut = asked.cut
    compared = [list(map(cut, texts)) if cut else texts for texts in (answers, references)]
    if cut and not any(compared[1]):
        raise InputError(f"--extract {asked.extract!r} finds nothing in any of the {len(references)} expected answers")
    chosen = answer_metrics.fitting(compared[1])
    chosen |= {name: answer_metrics.named(name, compared[1]) for name in asked.metrics}
    parts = {name: answer_metrics.parts(metric, *compared) for name, metric in chosen.items()}
    return Score(losses, answers, references, chosen, parts)


def forgetting(model, rows, adapted) -> dict:
    """Return {"after", "tokens"}: the loss on `rows` that were not trained on, nats a token; where a model is `adapted`, with
    its loss "before", and the rise since then as {"value", "low", "high"}."""
    after = np.array(metrics.losses(model, rows))
    found = {"after": mean(intervals.summed(after)), "tokens": int(after[:, 1].sum())}
    if not adapted:
        return found
    with model.disable_adapter():
        before = np.array(metrics.losses(model, rows))
    return found | {"before": mean(intervals.summed(before))} | intervals.change(mean, before, after)


def _reference(tokenizer, conversation):
    """Return the last answer as the model has to write it, calls of tools in the template's form."""
    example = masked_examples.encode(tokenizer, replace(conversation, flags=()), "last_assistant")[-1]
    trained = [label for label in example.labels if label != data.IGNORE_INDEX]
    return tokenizer.decode(trained[:-1], skip_special_tokens=True)
