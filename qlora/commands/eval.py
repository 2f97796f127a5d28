"""qlora eval: loss, perplexity and task metrics on held-out rows, with intervals; for a run, before and after training."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from .. import base_model, data, methods
from ..data import masked_examples
from ..evaluation import answer_metrics, choices, judge, latency, lm_eval_tasks, preferences, scores
from ..evaluation.asked import BUILT_IN, Asked
from ..evaluation.intervals import JUDGED_MARGIN
from ..evaluation.scores import PERPLEXITY
from ..jobs.evaluating import base_scores, choice_rows, class_scores, win_rate
from ..jobs.evaluating.eval_rows import general_rows, held_out_rows, joined_name, score_name, usual_rows
from ..jobs.opening.opened_model import open_subject
from ..system import launched
from ..system.devices import say_device
from ..system.errors import InputError
from ..system.events import note
from ..system.storage import write_json, write_text
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
    launched.refuse_several(f"qlora eval {target}")
    say_device()
    questions = None if wanted.choices is None else choice_rows.prompted(target, overrides, wanted, max_rows)
    subject = open_subject(target, overrides)
    wanted.refuse_for(base_model.task_of(subject.model).HAS_CLASSES, subject.run is not None)
    endpoint = None if wanted.judge is None else judge.opened(wanted.judge)
    if wanted.tasks:
        found = _of_tasks(subject, wanted, max_rows)
    elif questions is not None:
        found = _of_choices(subject, wanted, max_rows, *questions)
    else:
        found = _of_rows(subject, wanted, data_file, max_rows)
    found.result["data"]["command"] = _command(target, data_file, overrides, found.max_rows, wanted)
    write = functools.partial(_write, subject, found, wanted)
    if endpoint is not None and found.opponents is not None:
        known = _known_replies(subject, found, wanted)
        if not known:  # else the file that has them stays until they are in the new one
            write()
        try:
            win_rate.add(found.result, found.rows, endpoint, *found.opponents, known, write)
        finally:
            kept = write()
    else:
        kept = write()
    show_result(target, found.result, kept)
    wanted.check(found.result)
    return found.result


@dataclass(frozen=True)
class _Found:
    """What was measured. rows: a JSON object each, with its answers. name: in evals/; None: the run's own score. max_rows: None
    for as many as usual. opponents: as of win_rate."""

    result: dict
    rows: list
    name: str | None
    max_rows: int | None
    opponents: tuple[str, list[str] | None] | None = None

    @property
    def text(self):
        return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in self.rows)


def _of_rows(subject, wanted, data_file, max_rows) -> _Found:
    """Return the loss and the answers, in words or classes, on the run's held-out rows or those of `data_file`."""
    task = base_model.task_of(subject.model)
    has_classes, usual = task.HAS_CLASSES, usual_rows(task.NAME)
    max_rows = usual if max_rows is None else max_rows
    all_rows = held_out_rows(subject, data_file)
    rows = all_rows if max_rows is None else all_rows.first_rows(max_rows)
    if not len(rows):
        source = data_file or "data.eval or data.eval_fraction of the recipe"
        raise InputError(f"no rows left to evaluate on in {source}: all were dropped; `qlora data` shows why")
    base_model.refuse_rows(rows, subject.model.config, methods.num_positions(subject.model))
    judged = rows if not has_classes and rows.are_judged else None
    if judged is not None:
        if not judged.numbers("good").any():
            raise InputError("no row to evaluate on has a good answer (label: true)")
        rows = data.as_supervised(judged)
    said = data.conversations(rows)
    files = [{"path": str(part.path), "sha256": part.digest} for part in rows.parts]
    max_rows = None if max_rows == usual else max_rows
    given = [] if data_file is None else [(file["path"], file["sha256"]) for file in files]
    name = score_name(task.NAME, max_rows, given)
    asked = list(map(_asked, said))
    opponents = None
    if wanted.judge is not None:
        opponents = win_rate.opponents(wanted.judge_against, subject.recipe, name, asked)
    if has_classes:
        before, after = _before_and_after(
            subject, functools.partial(class_scores.score_of_classes, subject, rows), _CLASSES
        )
    else:
        measure = functools.partial(_score_of_words, subject, rows, said, wanted)
        known = None
        if wanted.before_of is not None:
            other = base_scores.open_evaluated(wanted.before_of, subject.run, name)
            known = functools.partial(base_scores.of_another_run, other, asked=asked, name=name, cut=wanted.cut)
        before, after = _before_and_after(subject, measure, _WORDS, known)
    result = _result(len(said), before, after)
    result |= class_scores.details(subject, rows, after) if has_classes else _beside(subject, said, wanted)
    if judged is not None:
        _add_margin(subject, judged, result, before, after)
    result["data"] = {
        "files": files,
        "held_out": data_file is None,
        "rows": len(said),
        "rows_in_all": len(all_rows.one_each()),
    }
    return _Found(result, _answers(asked, before, after), name, max_rows, opponents)


def _add_margin(subject, rows, result, before, after):
    """Add to a result by how much likelier good answers are than bad ones, where Rows of Judged have both. before, after: the
    Scores of the good ones."""
    bad = rows[rows.numbers("good") == 0]
    if not len(bad):
        return
    now = after.loss_N2, preferences.nats_of(subject.model, bad)
    result["metrics"][JUDGED_MARGIN] = preferences.margin_of(now)
    if subject.run is not None:
        with subject.model.disable_adapter():
            before = before.loss_N2, preferences.nats_of(subject.model, bad)
        result["before"]["metrics"][JUDGED_MARGIN] = preferences.margin_of(before)
        result["change"][JUDGED_MARGIN] = preferences.margin_of(now, before)


def _score_of_words(subject, rows, said, wanted, what):
    """Return the Score on `rows`; on pairs that of the chosen answers, and of what the model prefers."""
    pairs = rows.are_pairs
    of = (subject.tokenizer, subject.stops, data.as_supervised(rows), said, wanted, what)
    found = scores.score(subject.model, *of)
    return preferences.judged(found, subject.model, rows) if pairs else found


def _of_choices(subject, wanted, max_rows, questions, of) -> _Found:
    """Return which choices are likeliest of `questions`; of: what they are of, as choice_rows has it."""
    measure = (subject.model, subject.tokenizer, questions, wanted.chat, wanted.rows_together)
    before, after = _before_and_after(subject, functools.partial(choices.score, *measure), _CHOICES)
    result = _result(len(questions), before, after)
    result["data"] = of | {"held_out": False, "by_text": wanted.by_text, "chat": wanted.chat}
    words = (
        ["choices"]
        + [f"{of['shots']}-shots"] * (of["shots"] > 0)
        + ["by-text"] * wanted.by_text
        + ["chat"] * wanted.chat
    )
    rows = ({"prompt": one.messages if wanted.chat else one.text, "choices": [*one.choices]} for one in questions)
    file = of["files"][0]
    name = joined_name(f"{Path(file['path']).stem}-{file['sha256'][:8]}", max_rows, *words)
    return _Found(result, _answers(rows, before, after), name, max_rows)


def _of_tasks(subject, wanted, max_rows) -> _Found:
    """Return what lm-eval measures on its own tasks."""
    measure = functools.partial(lm_eval_tasks.score, subject.model, subject.tokenizer, wanted, max_rows)
    before, after = _before_and_after(subject, measure, _CHOICES)
    result = _result(after.num_rows, before, after)
    version = importlib.metadata.version("lm-eval")
    result["data"] = {"tasks": [*wanted.tasks], "lm_eval": version, "held_out": False, "files": []}
    result["data"] |= {"rows": after.num_rows, "shots": wanted.shots, "chat": wanted.chat}
    words = [f"{wanted.shots}-shots"] * (wanted.shots is not None) + ["chat"] * wanted.chat
    name = joined_name(f"lm-eval-{'+'.join(wanted.tasks)}"[:100], max_rows, *words)
    return _Found(result, after.rows(before), re.sub(r"[^\w.+-]", "_", name), max_rows)


def _result(num_rows, before, after):
    result = {"rows": num_rows, **after.to_json()}
    return result if before is None else result | {"before": before.to_json(), "change": after.since(before)}


# what is going on with the adapter, and without it
_WORDS = ("answering", "answering without the adapter")
_CLASSES = ("classifying", "classifying with the base under a new head")
_CHOICES = ("scoring", "scoring without the adapter")


def _before_and_after(subject, measure, words, known=None):
    """Return the Scores (before, after) of a run, (None, Score) of a plain model. measure(what=...) -> Score. known(after=...) ->
    the Score before, where it need not be measured."""
    after = measure(what=words[0])
    if subject.run is None:
        return None, after
    if known is not None:
        return known(after=after), after
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
        note("no latency: the rows are plain text without answers")
    return found


def _asked(said):
    """Return what a row asks, as JSON: the messages before its answer, its text or texts, or where its image is."""
    if hasattr(said, "messages"):
        return {"prompt": said.messages[:-1]} if said.messages else {"text": said.text}
    return {name: value for name in ("text", "pair", "image") if (value := getattr(said, name, None)) is not None}


def _answers(rows, before, after):
    """Return a JSON object for each of `rows`, objects that say what is asked: with what was expected and answered, and the
    parts of the metrics."""
    found = []
    for number, one in enumerate(rows):
        if after.answers:
            one["expected"] = after.references[number]
        for name, score in (("before", before), ("after", after)):
            if score is not None:
                one[name] = {"answer": score.answers[number]} if score.answers else {}
                one[name] |= {
                    key: parts[number].tolist() for key, (_, parts) in score.of_loss().items() if key != PERPLEXITY
                }
                one[name] |= {key: answer_metrics.to_json(parts[number]) for key, parts in score.parts.items()}
        found.append(one)
    return found


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
        with contextlib.suppress(FileNotFoundError):
            place.unlink()  # never a score beside answers of another
        write_text(kept, found.text)
        write_json(place, found.result)
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
