"""qlora eval: loss, perplexity and task metrics on held-out rows; for a run, before and after training."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import base_model, data
from ..data import examples
from ..evaluation import generate, metrics
from ..jobs.opened_model import open_subject
from ..recipe import Data
from ..system.errors import InputError
from ..system.storage import write_json
from ..terminal import console

MAX_ROWS = 100  # of the run's own score


def evaluate(target, data_file=None, overrides=(), max_rows=MAX_ROWS) -> dict:
    """Return {"loss", "perplexity", "tokens", "rows", "metrics", "before", "data"} of a run or a model on held-out rows.

    target: a run folder, a model folder or a hub name. data_file: rows to use; by default the first `max_rows` of those
    that the run has held out, which it knows by their content. For a run, "before" has the same keys for its base without
    the adapter, and the run's own score is written to eval.json; that of a `data_file` or of another number of rows goes
    into evals/. "data": what it was measured on.
    Loss is in nats a trained token; metrics are shares of greedy answers: `exact_match`, and `json_fields` where every
    reference is a JSON object.

    Raises:
        InputError: no such target, no rows to evaluate on, or held-out rows that are no longer in their file.
    """
    subject = open_subject(target, overrides)
    all_rows = _held_out(subject, data_file)
    rows = all_rows.first_rows(max_rows)
    if not len(rows):
        source = data_file or "data.eval or data.eval_fraction of the recipe"
        raise InputError(f"no rows left to evaluate on in {source}: all were dropped; `qlora data` shows why")
    base_model.refuse_rows(rows, subject.model.config)
    conversations = data.conversations(rows)
    result = {"rows": len(conversations), **_score(subject, conversations, rows, "answering")}
    if subject.run is not None:
        with subject.model.disable_adapter():
            result["before"] = _score(subject, conversations, rows, "answering without the adapter")
    result["data"] = {
        "files": [{"path": str(part.path), "sha256": part.digest} for part in rows.parts],
        "held_out": data_file is None,
        "rows": len(conversations),
        "rows_in_all": len(all_rows.one_each()),
        "command": _command(target, data_file, overrides, max_rows),
    }
    if subject.run is not None:
        place = _place(subject.run, result["data"], max_rows)
        place.parent.mkdir(exist_ok=True)
        write_json(place, result)
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
    section, run = recipe.data, subject.run
    sources = section.eval or section.train
    recorded = run.environment().get("held_out")
    if not recorded:
        raise InputError(f"{run.environment_file}: does not say which rows were held out; give --data FILE")
    rows = data.Rows(data.load(sources, tokenizer, section, recipe.training.seed))
    keys, found = np.array([int(key, 16) for key in recorded], np.uint64), rows.keys
    missing = int((~np.isin(keys, found)).sum())
    if missing:
        files = ", ".join(str(part.path) for part in rows.parts)
        raise InputError(
            f"{missing:,} of the {len(keys):,} held-out rows of {run.path} are no longer in {files}, so the score would be "
            "on other rows. Restore the file, or evaluate on other rows with --data FILE"
        )
    return rows[np.isin(found, keys)]


def _place(run, measured, max_rows):
    """Return the file for a score: eval.json for the run's own, else one in evals/ named after what it is of."""
    if measured["held_out"] and max_rows == MAX_ROWS:
        return run.eval_file
    first = measured["files"][0]
    name = "held-out" if measured["held_out"] else f"{Path(first['path']).stem}-{first['sha256'][:8]}"
    return run.evals / (f"{name}.json" if max_rows == MAX_ROWS else f"{name}-{max_rows}-rows.json")


def _command(target, data_file, overrides, max_rows):
    options = [] if data_file is None else ["--data", str(data_file)]
    options += [] if max_rows == MAX_ROWS else ["--max-rows", str(max_rows)]
    return shlex.join(["qlora", "eval", str(target), *overrides, *options])


def _score(subject, conversations, rows, what):
    loss, tokens = metrics.mean_loss(subject.model, rows)
    found = {}
    if all(conversation.messages for conversation in conversations):  # plain text has no question
        prompts = [
            examples.encode_prompt(subject.tokenizer, conversation.messages[:-1], conversation.tools)
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
    example = examples.encode(tokenizer, replace(conversation, flags=()), "last_assistant")[-1]
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
