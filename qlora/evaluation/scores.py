"""A model on held-out rows: its loss, its answers, and how many of them are right."""

from __future__ import annotations

from dataclasses import replace

from .. import data
from ..data import masked_examples
from . import generate, metrics


def score(model, tokenizer, stops, rows, conversations, what="answering") -> dict:
    """Return {"loss", "perplexity", "tokens", "metrics"} of a model on `rows`, data.Rows.

    conversations: those that the rows come from, one each.
    Loss is in nats a trained token; metrics are shares of greedy answers: `exact_match`, and `json_fields` where every
    reference is a JSON object; none where a row is plain text. stops: ids that end an answer. what: the progress is of.
    """
    loss, tokens = metrics.mean_loss(model, rows)
    found = {}
    if all(conversation.messages for conversation in conversations):  # plain text has no question
        prompts = [
            masked_examples.encode_prompt(tokenizer, conversation.messages[:-1], conversation.tools)
            for conversation in conversations
        ]
        references = [_reference(tokenizer, conversation) for conversation in conversations]
        longest = max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in references)
        answers = generate.answers(model, tokenizer, prompts, stops, max_new_tokens=longest + 16, what=what)
        found = metrics.task_metrics(answers, references)
    return {"loss": loss, "perplexity": metrics.perplexity(loss), "tokens": tokens, "metrics": found}


def _reference(tokenizer, conversation):
    """Return the last answer as the model has to write it, calls of tools in the template's form."""
    example = masked_examples.encode(tokenizer, replace(conversation, flags=()), "last_assistant")[-1]
    trained = [label for label in example.labels if label != data.IGNORE_INDEX]
    return tokenizer.decode(trained[:-1], skip_special_tokens=True)
