"""The scores of an evaluation, as tables."""

from __future__ import annotations

from ..evaluation.intervals import OF_LOSS, change_in_columns, is_share
from ..evaluation.judge import win_rate_in_words
from ..system import units
from .classes import show_classes
from .tables import show, table


def show_result(target, result, answers=None):
    """Show what `evaluate` returns: before and after of a run, or a model's own. answers: the file that has them; None: none."""
    classes, before = result.get("labels"), result.get("before")
    if before:
        header = ["", "base under a new head" if classes else "before", "after", "change", "95 %"]
    else:
        header = ["", "score", "95 %"]
    rows = [
        _row(name, result) for name in (*OF_LOSS, *result["metrics"]) if name in result or name in result["metrics"]
    ]
    table(_what(result) if before else f"{target}\n{_what(result)}", header, rows)
    if classes:
        show_classes(result)
    if found := result.get("forgetting"):
        if before:
            rise, ends = change_in_columns("forgetting", found)
            rise = f", {rise} by the training" + f" ({ends})" * bool(ends)
        else:
            rise = ""
        show(f"forgetting  loss {found['after']:.4f} on text that was not trained on ({found['data']}){rise}")
    if found := result.get("latency"):
        show(f"latency     {units.latency(found['token'])} a token, {units.latency(found['first_token'])} to the first")
    if found := result.get("judge"):
        show(f"win rate    {win_rate_in_words(found)}")
    show(f"answers     {answers or 'not kept; --answers FILE writes them to a file'}")


def _what(result):
    """Return in words what was measured on."""
    rows, of = f"{result['rows']:,}", result["data"]
    if "tasks" in of:
        return f"{rows} rows of lm-eval's {', '.join(of['tasks'])}"
    if "by_text" in of:
        return f"{rows} questions with choices, {of['shots']} example{'s' * (of['shots'] != 1)} before each"
    classes = result.get("labels")
    return f"{rows} held-out row{'s' * (result['rows'] != 1)}, " + (
        f"{len(classes)} classes" if classes else f"{result['tokens']} answer tokens"
    )


def _row(name, result):
    """Return a line of the table: before and after with the change, or the number, and the interval of that."""
    form = ".1%" if is_share(name) else ".4f"
    columns = [result["before"], result] if "before" in result else [result]
    values = [column[name] if name in OF_LOSS else column["metrics"][name]["value"] for column in columns]
    line = [name if "." in name else name.replace("_", " "), *(format(value, form) for value in values)]
    if "before" in result:
        return [*line, *change_in_columns(name, result["change"][name])]
    one = result["metrics"].get(name)
    low, high = result[f"{name}_interval"] if one is None else (one["low"], one["high"])
    return [*line, _interval(low, high, form)]


def _interval(low, high, form):
    return "" if low is None else f"{low:{form}} to {high:{form}}"
