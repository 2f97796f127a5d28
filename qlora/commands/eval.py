"""qlora eval: loss, perplexity and task metrics on held-out rows, with intervals; for a run, before and after training."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path

from .. import base_model
from ..evaluation import judge, lm_eval_tasks
from ..evaluation.asked import BUILT_IN, Asked
from ..jobs.evaluating import choice_rows, measured, win_rate
from ..jobs.opening import checkpoint_run
from ..jobs.opening.opened_model import open_subject
from ..system import launched
from ..system.devices import say_device
from ..system.events import Found, emit
from ..system.storage import as_json, write_text, write_together
from ..system.usual_torch import usual_torch
from ..terminal import shown
from ..terminal.evaluation import show_result


@shown()
@usual_torch()
def evaluate(target, data_file=None, overrides=(), max_rows=None, **asked) -> dict:
    """Return {"loss", "perplexity", "bits_per_byte", each with "NAME_interval", "tokens", "rows", "metrics", "before", "change",
    "data"} of a run or a model on held-out rows; with `forgetting`, `latency` or `judge_url` those too ("judge": as of
    judge.win_rate).

    target: a run folder, a checkpoint of one (RUN/checkpoints/step-N), a model folder or a hub name. data_file: rows to use;
    by default those that the run has held out, which it knows by their content. max_rows: the first of them; None: 100 where
    answers are generated, else all. asked: of evaluation.asked.Asked. For a run, "before" has the same keys for its base
    without the adapter, "change" what differs; the run's own score is written to eval.json and its answers to answers.jsonl;
    those of a `data_file`, of another number of rows, of `choices` or of lm-eval's `tasks`, into evals/. "data": what it is
    of.
    Loss is in nats a trained token; metrics are {"value", "low", "high"} of greedy answers: `exact_match`, and `json_fields`
    where every reference is a JSON object. Of classes the loss is in nats a row, metrics are `accuracy` and `macro_f1`, and
    there are "labels", "per_class", "confusion" and, of a run, "majority": always the most frequent class; "before" is the base
    under a new head, which guesses. Of choices metrics are `acc` and `acc_norm`; of tasks there is no loss, and metrics are
    `TASK.METRIC`. Intervals are of 95 %, over rows.

    Raises:
        InputError: no such target, no rows to evaluate on, or held-out rows that are no longer in their file.
        DoesNotFit: there is no memory for one row by itself.
        ProofFailed: what is required was not met; the result is written all the same.
    """
    wanted = Asked(**asked)
    wanted.refuse_beside(data_file)
    if wanted.tasks:
        lm_eval_tasks.named(wanted)
    launched.refuse_several(f"qlora eval {shlex.quote(str(target))}")
    say_device()
    if (run := checkpoint_run.run_at(target)) is not None:
        run.refuse_unwritable()
    questions = None if wanted.choices is None else choice_rows.prompted(target, overrides, wanted, max_rows)
    subject = open_subject(target, overrides)
    wanted.refuse_for(base_model.task_of(subject.model).HAS_CLASSES, subject.run is not None)
    endpoint = None if wanted.judge is None else judge.opened(wanted.judge)
    if wanted.tasks:
        found = measured.of_tasks(subject, wanted, max_rows)
    elif questions is not None:
        found = measured.of_choices(subject, wanted, max_rows, *questions)
    else:
        found = measured.of_rows(subject, wanted, data_file, max_rows)
    found.result["data"]["command"] = _command(target, data_file, overrides, found.max_rows, wanted)
    try:
        kept = _judged_and_written(subject, found, wanted, endpoint)
    except OSError:  # the disk is full: what was computed is shown at least
        show_result(target, found.result, "not written")
        emit(Found(found.result))
        raise
    show_result(target, found.result, kept)
    emit(Found(found.result))
    wanted.check(found.result)
    return found.result


def _judged_and_written(subject, found: measured.Measured, wanted, endpoint):
    """Add what a judge says, and write all; return the file of the answers. endpoint: of judge.opened; None: none is asked."""
    write = functools.partial(_write, subject, found, wanted)
    if endpoint is None or found.opponents is None:
        if subject.run is not None:
            win_rate.keep(found.result, found.rows, *_files(subject, found))
        return write()
    known = _known_replies(subject, found, wanted)
    if not known:  # else the file that has them stays until they are in the new one
        write()
    try:
        win_rate.add(found.result, found.rows, endpoint, *found.opponents, known, write)
    finally:
        kept = write()
    return kept


def _files(subject, found):
    """Return (scores, answers) of a run: its own, or those in evals/ of others and of a checkpoint."""
    name = found.name
    if subject.checkpoint is not None:
        name = f"{subject.checkpoint}-{name or 'held-out'}"
    return subject.run.score_files(name)


def _write(subject, found, wanted):
    """Write the score of a run and its answers, and the answers to a file that is `wanted`; return where they are."""
    kept = None
    if subject.run is not None:
        place, kept = _files(subject, found)
        place.parent.mkdir(exist_ok=True)
        # never a score beside answers of another
        write_together({kept: found.text.encode(), place: as_json(found.result)})
    if wanted.answers is not None:
        kept = Path(wanted.answers)
        write_text(kept, found.text)
    return kept


def _known_replies(subject, found, wanted):
    """Return what a judge has said before, see win_rate.known_replies."""
    places = [] if subject.run is None else [_files(subject, found)[1]]
    places += [] if wanted.answers is None else [Path(wanted.answers)]
    return {key: reply for place in places for key, reply in win_rate.known_replies(place).items()}


def _command(target, data_file, overrides, max_rows, wanted):
    options = [] if data_file is None else ["--data", str(data_file)]
    options += [] if max_rows is None else ["--max-rows", str(max_rows)]
    options += [part for name in wanted.metrics for part in ("--metric", name)]
    options += [] if wanted.extract is None else ["--extract", wanted.extract]
    options += ["--latency"] if wanted.latency else []
    options += ["--lm-eval", ",".join(wanted.tasks)] if wanted.tasks else []
    forgetting = wanted.forgetting or (wanted.general_text and BUILT_IN)
    named = {"--forgetting": forgetting, "--choices": wanted.choices, "--include-path": wanted.include_path}
    named |= {"--judge": wanted.judge_url, "--judge-model": wanted.judge_model}
    named |= {"--judge-against": wanted.judge_against, "--judge-criteria": wanted.judge_criteria}
    named |= {"--shots": wanted.shots, "--examples": wanted.examples, "--batch-size": wanted.batch_size}
    options += [part for name, value in named.items() if value is not None for part in (name, str(value))]
    options += ["--by-text"] * wanted.by_text + ["--chat"] * wanted.chat
    return shlex.join(["qlora", "eval", str(target), *overrides, *options])
