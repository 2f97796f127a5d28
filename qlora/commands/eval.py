"""qlora eval: loss, perplexity and task metrics on held-out rows; for a run, before and after training."""

from __future__ import annotations

import shlex
from pathlib import Path

from .. import base_model, data, methods
from ..evaluation.scores import score
from ..jobs.eval_rows import held_out_rows
from ..jobs.opened_model import open_subject
from ..system import launched
from ..system.devices import say_device
from ..system.errors import InputError
from ..system.storage import write_json
from ..terminal import shown
from ..terminal.tables import table

MAX_ROWS = 100  # of the run's own score


@shown()
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
    launched.refuse_several(f"qlora eval {target}")
    say_device()
    subject = open_subject(target, overrides)
    all_rows = held_out_rows(subject, data_file)
    rows = all_rows.first_rows(max_rows)
    if not len(rows):
        source = data_file or "data.eval or data.eval_fraction of the recipe"
        raise InputError(f"no rows left to evaluate on in {source}: all were dropped; `qlora data` shows why")
    base_model.refuse_rows(rows, subject.model.config, methods.num_positions(subject.model))
    conversations = data.conversations(rows)
    of = (subject.model, subject.tokenizer, subject.stops)
    result = {"rows": len(conversations), **score(*of, rows, conversations)}
    if subject.run is not None:
        with subject.model.disable_adapter():
            result["before"] = score(*of, rows, conversations, "answering without the adapter")
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


def _show(target, result):
    before = result.get("before")
    header = ["", "before", "after"] if before else ["", str(target)]
    columns = [before, result] if before else [result]
    rows = [[name, *(f"{column[name]:.4f}" for column in columns)] for name in ("loss", "perplexity")]
    for name in result["metrics"]:
        rows.append([name.replace("_", " "), *(f"{column['metrics'][name]:.1%}" for column in columns)])
    table(f"{result['rows']} held-out rows, {result['tokens']} answer tokens", header, rows)
