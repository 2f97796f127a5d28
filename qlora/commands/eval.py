"""qlora eval: loss, perplexity and task metrics on held-out rows; for a run, before and after training."""

from __future__ import annotations

from dataclasses import replace

from .. import base_model, data, generate, metrics
from ..data import chat
from ..errors import InputError
from ..recipe import Data
from ..rundir import write_json
from . import console
from .subject import open_subject


def evaluate(target, data_file=None, overrides=(), max_rows=100) -> dict:
    """Return {"loss", "perplexity", "tokens", "rows", "metrics", "before"} of a run or a model on held-out rows.

    target: a run folder, a model folder or a hub name. data_file: rows to use; by default those that the run's recipe
    holds out. For a run, "before" has the same keys for its base without the adapter, and eval.json is written.
    Loss is in nats a trained token; metrics are shares of greedy answers: `exact_match`, and `json_fields` where every
    reference is a JSON object.

    Raises:
        InputError: no such target, or no rows to evaluate on.
    """
    subject = open_subject(target, overrides)
    rows = _held_out(subject, data_file).first_rows(max_rows)
    if not len(rows):
        source = data_file or "data.eval or data.eval_fraction of the recipe"
        raise InputError(f"no row to evaluate on is left of {source}: all are dropped; look at them with qlora data")
    base_model.refuse_rows(rows, subject.model.config)
    conversations = data.conversations(rows)
    result = {"rows": len(conversations), **_score(subject, conversations, rows, "answering")}
    if subject.run is not None:
        with subject.model.disable_adapter():
            result["before"] = _score(subject, conversations, rows, "answering without the adapter")
        write_json(subject.run.eval_file, result)
    _show(target, result)
    return result


def _held_out(subject, data_file):
    """Return the Rows to evaluate on."""
    recipe, tokenizer = subject.recipe, subject.tokenizer
    if data_file is not None:
        settings = recipe.data.model_dump() if recipe else {"max_length": 2**30}
        section = Data.of_file(data_file, {**settings, "overlong": "error"})
        return data.Rows(data.load(section.train, tokenizer, section, seed=0))
    if recipe is None or not (recipe.data.eval or recipe.data.eval_fraction):
        raise InputError("no held-out rows: the recipe has neither data.eval nor data.eval_fraction; give --data FILE")
    section, seed = recipe.data, recipe.training.seed
    if section.eval:
        return data.Rows(data.load(section.eval, tokenizer, section, seed))
    return data.hold_out(data.Rows(data.load(section.train, tokenizer, section, seed)), section.eval_fraction, seed)[1]


def _score(subject, conversations, rows, what):
    loss, tokens = metrics.mean_loss(subject.model, rows)
    found = {}
    if all(conversation.messages for conversation in conversations):  # plain text has no question
        prompts = [
            chat.encode_prompt(subject.tokenizer, conversation.messages[:-1], conversation.tools)
            for conversation in conversations
        ]
        references = [_reference(subject.tokenizer, conversation) for conversation in conversations]
        longest = max(len(subject.tokenizer(text, add_special_tokens=False).input_ids) for text in references)
        with console.counting(what, len(prompts)) as advance:
            answers = generate.answers(
                subject.model, subject.tokenizer, prompts, subject.stops, max_new_tokens=longest + 16, on_batch=advance
            )
        found = metrics.task_metrics(answers, references)
    return {"loss": loss, "perplexity": metrics.perplexity(loss), "tokens": tokens, "metrics": found}


def _reference(tokenizer, conversation):
    """Return the last answer as the model has to write it, calls of tools in the template's form."""
    example = chat.encode(tokenizer, replace(conversation, flags=()), "last_assistant")[-1]
    trained = [label for label in example.labels if label != data.IGNORE_INDEX]
    return tokenizer.decode(trained[:-1], skip_special_tokens=True)


def _show(target, result):
    before = result.get("before")
    header = ["", "before", "after"] if before else ["", str(target)]
    columns = [before, result] if before else [result]
    rows = [[name, *(f"{column[name]:.4f}" for column in columns)] for name in ("loss", "perplexity")]
    for name in result["metrics"]:
        rows.append([name.replace("_", " "), *(f"{column['metrics'][name]:.1%}" for column in columns)])
    console.table(f"{result['rows']} held-out rows, {result['tokens']} answer tokens", header, rows)
