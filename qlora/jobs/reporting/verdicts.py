"""What a report says first of a run: did it learn, was the merge proven, did it fit. Of the facts of reported_run.py."""

from __future__ import annotations

import math
import shlex

from ...evaluation.asked import cut_in_words
from ...evaluation.intervals import OF_LOSS, is_share
from ...recipe.comparison import settings_in_words
from ...system.units import size

YES, NO, PARTLY, NOT_SHOWN, UNKNOWN = "yes", "no", "partly", "not shown", "not known"
EXPORTED, BESIDE = "exported", "exported, beside its base"  # what a report calls the scores of an export
_WORSE_BY = 0.02  # nats a token above the lowest held-out loss: 2 % more perplexity


def of(facts) -> list[dict]:
    """Return [{"question", "answer", "words", "command"}]; command: that would say more, or None."""
    return [
        {"question": "Did it learn?", **_learned(facts)},
        {"question": "Was the merge proven?", **_proven(facts)},
        {"question": "Does it fit?", **_fits(facts)},
    ]


def of_comparison(found) -> list[dict]:
    """Return the same of a comparison.json: which variant is best, did all trainings end well."""
    chosen = [one for one in found["summary"] if one["chosen"]]
    ended = [row for row in found["rows"] if row["status"] == "done"]
    others = sorted({row["status"] for row in found["rows"] if row["status"] != "done"})
    words = f"{len(ended)} of {len(found['rows'])} trainings" + (f"; others: {', '.join(others)}" if others else "")
    open_ones = bool(others) and set(others) <= {"to do", "unfinished"}
    whole = _said(
        UNKNOWN if open_ones else NO if others else YES, words, f"{found['command']} --resume" if others else None
    )
    return [{"question": "Which is best?", **_best(found, chosen)}, {"question": "Did all end well?", **whole}]


def _best(found, chosen):
    metric = found["metric"]
    if not chosen:
        return _said(UNKNOWN, "no training has ended well")
    first = min(chosen, key=lambda one: one["mean"] if found["lower_is_better"] else -one["mean"])
    low, mean, high = (number_of(metric, first[key]) for key in ("low", "mean", "high"))
    of = " ".join(filter(None, [first["variant"], settings_in_words(first["settings"])]))
    words = f"{metric.replace('_', ' ')} {mean} ({low} to {high}) of {of}"
    if len(chosen) == 1:
        return _said(first["variant"], f"{words}; there is no other variant that ended well")
    if first["best"] is True:
        return _said(first["variant"], f"{words}: ahead of every other variant by more than chance")
    equal = [one["variant"] for one in chosen if one is not first and one["best"]]
    end = "lowest" if found["lower_is_better"] else "highest"
    return _said(NOT_SHOWN, f"{end} mean: {words}. No difference shown to {', '.join(equal) or 'others'}")


def _said(answer, words, command=None):
    return {"answer": answer, "words": words, "command": command}


def number_of(name, value, signed=False):
    """Return a metric's value as text: a share in percent, a loss with four digits; "?" of one that is no finite number."""
    if value is None or not math.isfinite(value):
        return "?"
    return format(value, ("+" if signed else "") + (".1%" if is_share(name) else ".4f"))


def change_in_words(name, change):
    """Return "+12.0% (8.1% to 15.2%)" of {"value", "low", "high"}; "points" of a share, since it is a difference."""
    unit = " points" if is_share(name) else ""
    if change["low"] is None:
        return f"{number_of(name, change['value'], signed=True).rstrip('%')}{unit} (too few rows for an interval)"
    value, low, high = (number_of(name, change[key], signed=True).rstrip("%") for key in ("value", "low", "high"))
    return f"{value}{unit} (95 %: {low} to {high})"


def _learned(facts):
    scores = facts["scores"]
    evaluate = shlex.join(["qlora", "eval", facts["path"]])
    if "missing" in scores:
        return _by_losses(facts, evaluate)
    name = next(iter(scores["metrics"] or {}), "loss")
    change = scores["change"] or {}
    if not scores["before"] or name not in change:
        return _said(UNKNOWN, "evaluated by an older version, without intervals of the change", evaluate)
    before, after = (
        number_of(name, side["loss"] if name == "loss" else side["metrics"][name]["value"])
        for side in (scores["before"], scores)
    )
    rows = f"{scores['rows']:,} held-out row{'s' * (scores['rows'] != 1)}"
    words = f"{name.replace('_', ' ')} {before} before, {after} after on {rows}: {change_in_words(name, change[name])}"
    words += cut_in_words(scores.get("extract")) if name != "loss" else ""
    answer = _direction(name, change[name])
    if name != "loss" and "loss" in change:
        words += f"; loss {change_in_words('loss', change['loss'])}"
        if answer == NOT_SHOWN and _direction("loss", change["loss"]) == YES:
            answer, words = PARTLY, f"{words}. The loss fell; that more answers are right is not shown"
    if answer == NO:
        words += ". It got worse"
    elif answer == NOT_SHOWN:
        words += ". No difference shown: more held-out rows may show one"
    if start := facts.get("started_from"):
        of_both = shlex.join(["qlora", "compare", start, facts["path"], "--data", "FILE"])
        words += f'. "Before" is the base, without {start}: what this run changed of that is  {of_both}'
    return _said(answer, words + _afterwards(facts, scores))


def _direction(name, change):
    """Return YES or NO where the whole interval of a change lies on one side of 0, else NOT_SHOWN."""
    if change["low"] is None or change["high"] is None:
        return NOT_SHOWN
    low, high = (-change["high"], -change["low"]) if name in OF_LOSS else (change["low"], change["high"])
    return YES if low > 0 else NO if high < 0 else NOT_SHOWN


def _afterwards(facts, scores):
    """Return in words what speaks against it: a held-out loss that had been lower, other text forgotten."""
    words, losses = "", facts["curves"].get("eval_loss", [])
    if losses and not _has_best(facts):
        step, least = min(losses, key=lambda point: point[1])
        if losses[-1][1] > least + _WORSE_BY:
            words += f". The held-out loss was lowest at step {step:,} ({least:.4f}), {losses[-1][1]:.4f} at the end: it overfits"
    forgetting = scores.get("forgetting") or {}
    if (forgetting.get("low") or 0) > 0:
        words += f". Loss on text that was not trained on rose: {change_in_words('forgetting', forgetting)}"
    return words


def _has_best(facts):
    """True if the adapter is that of the best evaluation, and not of the last step."""
    return bool(facts["best"] and facts["best"]["loaded"])


def _by_losses(facts, evaluate):
    for name, said in (("eval_loss", "held-out loss"), ("loss", "training loss")):
        points = facts["curves"].get(name, [])
        if len(points) > 1:
            (first, then), (last, now) = points[0], points[-1]
            if name == "eval_loss" and _has_best(facts):
                last, now = facts["best"]["best_step"], facts["best"]["eval_loss"]
            course = f"{then:.4f} at step {first:,}, {now:.4f} at step {last:,}"
            if last == first:
                course = f"{now:.4f} at step {last:,}, which was the best"
            return _said(UNKNOWN, f"not evaluated; {said} {course}, without an interval", evaluate)
    for step, loss in facts["curves"].get("loss", []):  # one
        return _said(UNKNOWN, f"not evaluated; loss {loss:.4f} at step {step:,} alone", evaluate)
    return _said(UNKNOWN, "not evaluated, and no losses were logged", evaluate)


def _proven(facts):
    export = shlex.join(["qlora", "export", facts["path"], "--out", "FOLDER"])
    if not facts["exports"]:
        return _said(UNKNOWN, "no export next to the run; of one in another folder: qlora report RUN EXPORT", export)
    newest = facts["exports"][0]
    if not newest["verified"]:
        return _said(NO, f"{newest['path']} was written with export.verify: off", export)
    found = dict(newest["scores"])
    exported = next((found[name] for name in (EXPORTED, BESIDE) if name in found), {})
    words = f"{newest['path']} ({newest['dtype'] or 'the adapter alone'}) answers as the live model"
    if exported.get("kl") is not None:
        words += f": KL {exported['kl']:.1e}"
    if exported.get("top1") is not None:
        words += f", same first choice at {exported['top1']:.2%} of positions"
    if not newest["made_of_this_run"]:
        words += "; an older export, which does not say what it was made of: it is this run's by your word"
    if newest["live_model"] == "assumed":
        return _said(PARTLY, f"{words}; what the adapter was trained on was assumed")
    return _said(YES, words)


def _fits(facts):
    memory = facts["memory"]
    if "missing" in memory:
        return _said(UNKNOWN, memory["missing"], shlex.join(["qlora", "plan", f"{facts['path']}/recipe.yaml"]))
    peak, limit, predicted = (memory[name] for name in ("peak_bytes", "limit_bytes", "predicted_bytes"))
    if memory["out_of_memory"]:
        return _said(NO, f"it ran out of memory {memory['out_of_memory']}")
    words = f"peak {size(peak)}" if peak else "the peak was not measured"
    if peak and limit:
        words += f" of {size(limit)} that were there"
    if peak and predicted:
        words += f"; predicted {size(predicted)}, measured {peak / predicted - 1:+.0%}"
    if memory["less_memory"]:
        times = "once" if memory["less_memory"] == 1 else f"{memory['less_memory']} times"
        return _said(PARTLY, f"{words}; memory ran out {times} on the way, and it went on with less")
    return _said(YES if peak else UNKNOWN, words)
