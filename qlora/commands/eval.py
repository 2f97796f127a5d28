"""qlora eval: loss, perplexity and task metrics on held-out rows, with intervals; for a run, before and after training."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
from pathlib import Path

from .. import base_model, data, methods
from ..data import masked_examples
from ..evaluation import answer_metrics, latency, scores
from ..evaluation.asked import BATCH_SIZE, BUILT_IN, Asked
from ..jobs import class_scores
from ..jobs.eval_rows import general_rows, held_out_rows, held_out_rows_name
from ..jobs.opened_model import open_subject
from ..system import launched
from ..system.devices import say_device
from ..system.errors import InputError
from ..system.events import note
from ..system.storage import write_json, write_text
from ..terminal import shown
from ..terminal.evaluation import show_result

MAX_ROWS = 100  # of the run's own score, where answers are words: a class is one forward pass, and all rows are taken


@shown()
def evaluate(target, data_file=None, overrides=(), max_rows=None, **asked) -> dict:
    """Return {"loss", "loss_interval", "perplexity", "tokens", "rows", "metrics", "before", "change", "data"} of a run or a
    model on held-out rows; with `forgetting` or `latency` those too.

    target: a run folder, a model folder or a hub name. data_file: rows to use; by default those that the run has held out,
    which it knows by their content. max_rows: the first of them; None: 100, of a model that answers with classes all. asked: of
    evaluation.asked.Asked. For a run, "before" has the same keys for its base without the adapter, "change" what differs; the
    run's own score is written to eval.json and its answers to answers.jsonl; those of a `data_file`, or of another number of
    rows, into evals/. "data": what it is of.
    Loss is in nats a trained token; metrics are {"value", "low", "high"} of greedy answers: `exact_match`, and `json_fields`
    where every reference is a JSON object. Of classes the loss is in nats a row, metrics are `accuracy` and `macro_f1`, and
    there are "labels", "per_class", "confusion" and, of a run, "majority": always the most frequent class; "before" is the base
    under a new head, which guesses. Intervals are of 95 %, over rows.

    Raises:
        InputError: no such target, no rows to evaluate on, or held-out rows that are no longer in their file.
        ProofFailed: what is required was not met; the result is written all the same.
    """
    wanted = Asked(**asked)
    launched.refuse_several(f"qlora eval {target}")
    say_device()
    subject = open_subject(target, overrides)
    has_classes = base_model.task_of(subject.model).HAS_CLASSES
    wanted.refuse_for(has_classes, subject.run is not None)
    usual = None if has_classes else MAX_ROWS
    max_rows = usual if max_rows is None else max_rows
    all_rows = held_out_rows(subject, data_file)
    rows = all_rows if max_rows is None else all_rows.first_rows(max_rows)
    if not len(rows):
        source = data_file or "data.eval or data.eval_fraction of the recipe"
        raise InputError(f"no rows left to evaluate on in {source}: all were dropped; `qlora data` shows why")
    base_model.refuse_rows(rows, subject.model.config, methods.num_positions(subject.model))
    said = data.conversations(rows)
    if has_classes:
        before, after = _before_and_after(
            subject, functools.partial(class_scores.score_of_classes, subject, rows), _CLASSES
        )
    else:
        of = (subject.model, subject.tokenizer, subject.stops, rows, said, wanted)
        before, after = _before_and_after(subject, functools.partial(scores.score, *of), _WORDS)
    result = {"rows": len(said), **after.to_json()}
    if before is not None:
        result |= {"before": before.to_json(), "change": after.since(before)}
    result |= class_scores.details(subject, rows, after) if has_classes else _beside(subject, said, wanted)
    result["data"] = {
        "files": [{"path": str(part.path), "sha256": part.digest} for part in rows.parts],
        "held_out": data_file is None,
        "rows": len(said),
        "rows_in_all": len(all_rows.one_each()),
        "command": _command(target, data_file, overrides, None if max_rows == usual else max_rows, wanted),
    }
    if subject.run is not None:
        _write(subject.run, result, None if max_rows == usual else max_rows, _answers(said, before, after))
    show_result(target, result)
    wanted.check(result)
    return result


# what is going on with the adapter, and without it
_WORDS = ("answering", "answering without the adapter")
_CLASSES = ("classifying", "classifying with the base under a new head")


def _before_and_after(subject, measure, words):
    """Return the Scores (before, after) of a run, (None, Score) of a plain model. measure(what=...) -> Score."""
    after = measure(what=words[0])
    if subject.run is None:
        return None, after
    with subject.model.disable_adapter():
        return measure(what=words[1]), after


def _beside(subject, conversations, wanted):
    """Return {"forgetting": ...} and {"latency": ...}, where they are asked for."""
    found = {}
    if wanted.general_text is not None:
        rows = general_rows(subject, wanted.general_text)
        found["forgetting"] = scores.forgetting(subject.model, rows, subject.run is not None)
        found["forgetting"]["data"] = BUILT_IN if wanted.forgetting in (None, BUILT_IN) else wanted.forgetting
    asked = [conversation for conversation in conversations if conversation.messages] if wanted.latency else []
    if asked:
        prompt = masked_examples.encode_prompt(subject.tokenizer, asked[0].messages[:-1], asked[0].tools)
        found["latency"] = latency.seconds_of(subject.model, subject.tokenizer, prompt)
    elif wanted.latency:
        note("no latency: the rows are plain text, to which there is no answer")
    return found


def _asked(said):
    """Return what a row asks, as JSON: the messages before its answer, its text or texts, or where its image is."""
    if hasattr(said, "messages"):
        return {"prompt": said.messages[:-1]} if said.messages else {"text": said.text}
    return {name: value for name in ("text", "pair", "image") if (value := getattr(said, name, None)) is not None}


def _answers(said, before, after):
    """Return a JSON object for each row: what it asks, what was expected and answered, and the parts of the metrics."""
    found = []
    for number, one in enumerate(map(_asked, said)):
        if after.answers:
            one["expected"] = after.references[number]
        for name, score in (("before", before), ("after", after)):
            if score is not None:
                one[name] = {"answer": score.answers[number]} if score.answers else {}
                one[name]["loss"] = score.loss_N2[number].tolist()
                one[name] |= {key: answer_metrics.to_json(parts[number]) for key, parts in score.parts.items()}
        found.append(one)
    return found


def _write(run, result, max_rows, answers):
    """Write the run's own score to eval.json and its answers to answers.jsonl, others into evals/ under a name of their own.
    max_rows: None for as many as the run's own score has."""
    measured, name = result["data"], None
    if not measured["held_out"]:
        first = measured["files"][0]
        name = f"{Path(first['path']).stem}-{first['sha256'][:8]}"
    if max_rows is not None:
        name = held_out_rows_name(max_rows) if name is None else f"{name}-{max_rows}-rows"
    place, beside = run.score_files(name)
    place.parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        place.unlink()  # never a score beside answers of another
    write_text(beside, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in answers))
    write_json(place, result)


def _command(target, data_file, overrides, max_rows, wanted):
    options = [] if data_file is None else ["--data", str(data_file)]
    options += [] if max_rows is None else ["--max-rows", str(max_rows)]
    options += [part for name in wanted.metrics for part in ("--metric", name)]
    options += [] if wanted.extract is None else ["--extract", wanted.extract]
    options += [] if wanted.batch_size == BATCH_SIZE else ["--batch-size", str(wanted.batch_size)]
    options += [] if wanted.forgetting is None else ["--forgetting", str(wanted.forgetting)]
    options += ["--latency"] if wanted.latency else []
    return shlex.join(["qlora", "eval", str(target), *overrides, *options])
