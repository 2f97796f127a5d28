"""A comparison on a terminal of 80 columns: one line a setting, the other numbers are in its files; and two runs side by side."""

from __future__ import annotations

import json

from ..evaluation.intervals import OF_LOSS, change_in_columns, in_words, is_share
from ..recipe.comparison import settings_in_words
from ..system.units import duration, latency, size
from .tables import show, table, text_table

_SAME, _BEST = "≈", "*"


def show_comparison(found):
    """Show comparison.json: a table of what ended well, a line for each training that did not, and what the words mean."""
    percent = is_share(found["metric"])
    fields = {field for one in found["summary"] for field in one["settings"]}
    alone = next(iter(fields)) if len(fields) == 1 else None
    header = ["", "setting", found["metric"].replace("_", " "), "95 %", "forgets", "time", "peak"]
    rows = []
    for one in found["summary"]:
        mark = f" {_BEST}" if one["best"] is True else f" {_SAME}" if one["best"] else "  "
        setting = settings_in_words(one["settings"])
        rows.append(
            [
                one["variant"],
                setting.rpartition(" ")[2] if alone else setting,
                (f"{one['mean']:.1%}" if percent else f"{one['mean']:.4f}") + mark,
                f"{one['low']:.0%}-{one['high']:.0%}" if percent else f"{one['low']:.3f}-{one['high']:.3f}",
                "" if one["forgetting"] is None else f"{one['forgetting']:+.3f}",
                "" if one["seconds"] is None else duration(one["seconds"]),
                "" if one["peak_bytes"] is None else size(one["peak_bytes"]),
            ]
        )
    of = f"; setting: {alone}" if alone else ""
    if rows:
        table(f"{found['name']}: {found['metric'].replace('_', ' ')} by variant{of}", header, rows)
        if any(one["best"] is True for one in found["summary"]):
            show(f"{_BEST} ahead of every other variant by more than chance")
        else:
            show(f"{_SAME} may be as good as the best: no difference shown")
    for row in found["rows"]:
        if row["status"] != "done":
            words = ", ".join(filter(None, [row["variant"], settings_in_words(row["settings"]), f"seed {row['seed']}"]))
            reason = (row["message"] or "").split("\n")[0]
            show(f"{words}: {row['status']}" + (f": {reason}" if reason else ""))
    show("")
    for line in found["notes"]:
        show(line)


def show_two_runs(names, rows, differing, change):
    """Show what differs between two runs, and what was measured of each: rows, differing and change as of `compare_runs`."""
    for what, found in differing.items():
        if found:
            lines = [[name, _cell(one), _cell(other)] for name, one, other in found]
            text_table(f"{what}: what differs", ["", *names], lines)
    if not any(differing.values()):
        show("recipe, data, versions and base model are the same")
    table("measured", ["", *names, "change", "95 %"], [*_scores(rows, change), *_win_rates(rows), *_costs(rows)])


def _cell(value):
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
    text = "none" if value is None else text
    return text if len(text) <= 60 else f"{text[:57]}..."


def _scores(rows, change):
    """Return a line for each number of the loss and each metric of both runs, with what changed."""
    lines = []
    of_loss = [name for name in OF_LOSS if any(row[name] is not None for row in rows)]
    for name in (*of_loss, *dict.fromkeys(name for row in rows for name in row["metrics"])):
        values = [row[name] if name in OF_LOSS else row["metrics"].get(name, {}).get("value") for row in rows]
        form = ".1%" if is_share(name) else ".4f"
        line = [name.replace("_", " "), *("" if value is None else format(value, form) for value in values)]
        lines.append([*line, *(change_in_columns(name, change[name]) if name in change else ("", ""))])
    return lines


def _win_rates(rows):
    """Return lines with the win rates that a judge has found, one for each pair of judge and opponent: others say nothing about
    each other."""
    found: dict[tuple, list[str]] = {}
    for number, judged in enumerate(row["judge"] for row in rows):
        if judged is not None and judged["win_rate"] is not None:
            line = found.setdefault((judged["against"], judged["model"]), [""] * len(rows))
            line[number] = in_words(judged["win_rate"])
    return [[f"win rate over {against}, by {model}", *line, "", ""] for (against, model), line in found.items()]


_COSTS = {
    "training time": ("seconds", duration),
    "peak memory": ("peak_bytes", size),
    "trained parameters": ("trainable_parameters", "{:,}".format),
    "saved": ("saved_bytes", size),
    "an answer's token": ("latency_seconds", latency),
    "forgetting": ("forgetting", "{:+.4f}".format),
}


def _costs(rows):
    found = []
    for what, (name, said) in _COSTS.items():
        values = [row[name] for row in rows]
        if any(value is not None for value in values):
            found.append([what, *("" if value is None else said(value) for value in values), "", ""])
    return found
