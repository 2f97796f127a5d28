"""What an evaluation measures of a model, and of a run's base: on rows, on questions with choices, on tasks of lm-eval."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

from ... import base_model, data, methods
from ...data import masked_examples
from ...evaluation import answer_metrics, choices, latency, lm_eval_tasks, preferences, scores
from ...evaluation.asked import BUILT_IN
from ...evaluation.intervals import JUDGED_MARGIN
from ...evaluation.scores import PERPLEXITY
from ...system.errors import InputError
from ...system.events import note
from ...system.storage import json_line
from . import base_scores, class_scores, win_rate
from .eval_rows import general_rows, held_out_rows, joined_name, name_of, score_name, usual_rows


@dataclass(frozen=True)
class Measured:
    """What was measured. rows: a JSON object each, with its answers. name: in evals/; None: the run's own score. max_rows: None
    for as many as usual. opponents: as of win_rate."""

    result: dict
    rows: list
    name: str | None
    max_rows: int | None
    opponents: tuple[str, list[str] | None] | None = None

    @property
    def text(self):
        return "".join(map(json_line, self.rows))


def of_rows(subject, wanted, data_file, max_rows) -> Measured:
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
    unpaired = rows if not has_classes and rows.are_unpaired else None
    if unpaired is not None:
        if not unpaired.numbers("good").any():
            raise InputError("no row to evaluate on has a good answer (label: true)")
        rows = data.as_supervised(unpaired)
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
    if unpaired is not None:
        _add_margin(subject, unpaired, result, before, after)
    result["data"] = {
        "files": files,
        "held_out": data_file is None,
        "rows": len(said),
        "rows_in_all": len(all_rows.one_each()),
        **({} if wanted.extract is None else {"extract": wanted.extract}),
    }
    return Measured(result, _answers(asked, before, after), name, max_rows, opponents)


def _add_margin(subject, rows, result, before, after):
    """Add to a result by how much likelier good answers are than bad ones, where Rows of Unpaired have both. before, after: the
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
    return preferences.with_preferences(found, subject.model, rows) if pairs else found


def of_choices(subject, wanted, max_rows, questions, of) -> Measured:
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
    name = joined_name(name_of(Path(file["path"]).stem, file["sha256"]), max_rows, *words)
    return Measured(result, _answers(rows, before, after), name, max_rows)


def of_tasks(subject, wanted, max_rows) -> Measured:
    """Return what lm-eval measures on its own tasks."""
    measure = functools.partial(lm_eval_tasks.score, subject.model, subject.tokenizer, wanted, max_rows)
    before, after = _before_and_after(subject, measure, _CHOICES)
    result = _result(after.num_rows, before, after)
    version = importlib.metadata.version("lm-eval")
    result["data"] = {"tasks": [*wanted.tasks], "lm_eval": version, "held_out": False, "files": []}
    result["data"] |= {"rows": after.num_rows, "shots": wanted.shots, "chat": wanted.chat}
    words = [f"{wanted.shots}-shots"] * (wanted.shots is not None) + ["chat"] * wanted.chat
    name = joined_name(f"lm-eval-{'+'.join(wanted.tasks)}"[:100], max_rows, *words)
    return Measured(result, after.rows(before), re.sub(r"[^\w.+-]", "_", name), max_rows)


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
