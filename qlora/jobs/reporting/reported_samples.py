"""What a training answered as it went, and its best evaluation, as a report shows them: of many a bounded number."""

from __future__ import annotations

import json
from typing import Any

from ...runs import record
from .reported_answers import asked, cut

_TEXT = 600  # characters


def best(lines) -> dict[str, Any] | None:
    """Return the record.Best of the lines of metrics.jsonl as an object; None of a training that did not look for it."""
    ends = [line for line in lines if isinstance(line, record.Best)]
    return record.to_json(ends[-1]) if ends else None


def samples(lines, most_questions, most_steps) -> dict[str, Any]:
    """Return {"questions": [{"asked", "expected", "answers": [[step, text], ...], "left_out"}, ...], "left_out"} of the lines of
    metrics.jsonl; without a sample {"missing"}. left_out: how many steps, and how many questions, are not shown.

    Of many steps the first, the last, the best and some between them are there.

    Raises:
        LookupError, TypeError, AttributeError: a sample is not one of ours.
    """
    found: dict = {}
    for line in lines:
        if isinstance(line, record.Samples):
            for place, one in enumerate(
                line.samples
            ):  # the same held-out rows each time, unless the recipe was changed
                question = json.dumps([place, one["prompt"], one["expected"]])
                found.setdefault(question, (one, {}))[1][line.step] = one["answer"]
    if not found:
        return {"missing": "none: training.num_samples=3 has held-out rows answered at each evaluation"}
    at_best = (best(lines) or {}).get("best_step")
    return {
        "questions": [
            {"asked": asked(one), "expected": cut(one["expected"], _TEXT)} | _answers(given, at_best, most_steps)
            for one, given in list(found.values())[:most_questions]
        ],
        "left_out": max(0, len(found) - most_questions),
    }


def _answers(given, at_best, most):
    last = len(given) - 1
    chosen = range(len(given)) if last < most else {round(n * last / (most - 1)) for n in range(most)}
    kept = [[step, cut(text, _TEXT)] for n, (step, text) in enumerate(given.items()) if n in chosen or step == at_best]
    return {"answers": kept, "left_out": len(given) - len(kept)}
