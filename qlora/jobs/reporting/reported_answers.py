"""The answers of a run as a report shows them: counted in all, a bounded number of rows and characters of them kept."""

from __future__ import annotations

import json
from typing import Any

from ...system.errors import InputError

_MOST_TEXT = 1500  # characters of an answer
_MOST_PROMPT, _MOST_MESSAGES = 800, 6
# what became of a row between before and after; rows are chosen in this order
WORSE, WRONG, BETTER, RIGHT, OPEN = "got worse", "wrong", "fixed", "right", "not compared"
_ORDER = (WORSE, WRONG, BETTER, RIGHT, OPEN)


def cut(text, most=_MOST_TEXT):
    """Return `text`, or its first `most` characters and how many were left out."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]} [... {len(text) - most:,} more characters]"


def answers(file, metrics, most_rows) -> dict[str, Any]:
    """Return {"rows", "counts": {what became of a row: how many}, "metric", "shown": [...], "left_out"} of an answers.jsonl.

    metrics: names of what was measured. metric: the one of them that says which are right. shown: at most `most_rows`, got worse
    and wrong ones first, each {"number" (from 1), "asked", "before", "after", "expected", "became", "loss": [before, after],
    "judge": its verdict or None}, long texts cut.

    Raises:
        InputError: a line is not one of ours; names it.
    """
    became, places, metric, line = [], [], None, 0
    try:
        with open(file, "rb") as stream:
            for line, raw in enumerate(stream, 1):  # noqa: B007 (of the message)
                row = json.loads(raw)
                metric = metric or _metric(row, metrics)
                became.append(_became(row, metric))
                places.append(stream.tell() - len(raw))
            chosen = sorted(range(len(became)), key=lambda number: (_ORDER.index(became[number]), number))[:most_rows]
            shown = []
            for number in sorted(chosen):
                line = number + 1
                stream.seek(places[number])
                shown.append(_shown(json.loads(stream.readline()), number + 1, became[number]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} line {line}: {error!r}; the run folder is damaged; run qlora eval again") from None
    counts = {name: became.count(name) for name in _ORDER if name in became}
    return {
        "rows": len(became),
        "counts": counts,
        "metric": metric,
        "shown": shown,
        "left_out": len(became) - len(shown),
    }


def _metric(row, metrics):
    """Return the name of the metric that says whether an answer is right: the first that counts it as right of so many."""
    after = row["after"]
    return next((name for name in metrics if isinstance(after.get(name), list) and len(after[name]) == 2), None)


def _is_right(side, metric):
    return side[metric][0] >= side[metric][1]


def _became(row, metric):
    if metric is None:
        return OPEN
    after = _is_right(row["after"], metric)
    if "before" not in row:
        return RIGHT if after else WRONG
    before = _is_right(row["before"], metric)
    return (RIGHT if before else BETTER) if after else (WORSE if before else WRONG)


def _shown(row, number, became):
    sides = [row.get(name) or {} for name in ("before", "after")]
    return {
        "number": number,
        "asked": asked(row),
        "before": None if "answer" not in sides[0] else cut(sides[0]["answer"]),
        "after": None if "answer" not in sides[1] else cut(sides[1]["answer"]),
        "expected": None if "expected" not in row else cut(row["expected"]),
        "became": became,
        "judge": row.get("judge", {}).get("verdict"),
        "loss": [side["loss"][0] / side["loss"][1] if side.get("loss") and side["loss"][1] else None for side in sides],
    }


def asked(row):
    """Return [[who or what, text], ...] of what a row asks."""
    if "prompt" in row:
        messages = row["prompt"]
        said = [[str(one.get("role")), cut(_content(one), _MOST_PROMPT)] for one in messages[-_MOST_MESSAGES:]]
        left = len(messages) - len(said)
        return ([["", f"[{left} earlier messages]"]] if left else []) + said
    return [[name, cut(row[name], _MOST_PROMPT)] for name in ("text", "pair", "image") if name in row]


def _content(message):
    content = message.get("content")
    others = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    return content if isinstance(content, str) and not others else {"content": content, **others} if others else content
