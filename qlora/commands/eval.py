"""qlora eval: loss, perplexity and task metrics on held-out rows; for a run, before and after training."""

from __future__ import annotations

from .. import data, generate, metrics
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
    section = subject.recipe.data if subject.recipe else Data(train=["-"])
    conversations = _held_out(subject, data_file)[:max_rows]
    _, examples = data.encode(conversations, subject.tokenizer, section.model_copy(update={"overlong": "error"}), {})
    result = {"rows": len(conversations), **_score(subject, conversations, examples, "answering")}
    if subject.run is not None:
        with subject.model.disable_adapter():
            result["before"] = _score(subject, conversations, examples, "answering without the adapter")
        write_json(subject.run.eval_file, result)
    _show(target, result)
    return result


def _held_out(subject, data_file):
    if data_file is not None:
        return [
            c
            for source in data.read([data_file], subject.recipe.data.columns if subject.recipe else None)
            for c in source.conversations
        ]
    rows = held_out_conversations(subject.recipe) if subject.recipe else []
    if not rows:
        raise InputError("no held-out rows: the recipe has neither data.eval nor data.eval_fraction; give --data FILE")
    return rows


def held_out_conversations(recipe):
    """Return the conversations that `recipe` keeps out of training; an empty list if it keeps none."""
    if recipe.data.eval:
        return [c for source in data.read(recipe.data.eval, recipe.data.columns) for c in source.conversations]
    if not recipe.data.eval_fraction:
        return []
    return data.hold_out(
        data.read(recipe.data.train, recipe.data.columns), recipe.data.eval_fraction, recipe.training.seed
    )[1]


def _score(subject, conversations, examples, what):
    loss, tokens = metrics.mean_loss(subject.model, examples)
    references = [conversation.messages[-1]["content"] for conversation in conversations]
    longest = max(len(subject.tokenizer(text, add_special_tokens=False).input_ids) for text in references)
    prompts = [_prompt(subject.tokenizer, conversation) for conversation in conversations]
    with console.counting(what, len(prompts)) as advance:
        answers = generate.answers(
            subject.model, subject.tokenizer, prompts, subject.stops, max_new_tokens=longest + 16, on_batch=advance
        )
    found = metrics.task_metrics(answers, references)
    return {"loss": loss, "perplexity": metrics.perplexity(loss), "tokens": tokens, "metrics": found}


def _prompt(tokenizer, conversation):
    text = chat.render(tokenizer, conversation.messages[:-1], add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def _show(target, result):
    before = result.get("before")
    header = ["", "before", "after"] if before else ["", str(target)]
    columns = [before, result] if before else [result]
    rows = [[name, *(f"{column[name]:.4f}" for column in columns)] for name in ("loss", "perplexity")]
    for name in result["metrics"]:
        rows.append([name.replace("_", " "), *(f"{column['metrics'][name]:.1%}" for column in columns)])
    console.table(f"{result['rows']} held-out rows, {result['tokens']} answer tokens", header, rows)
