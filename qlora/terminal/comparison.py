"""A comparison on a terminal of 80 columns: one line a setting; the other numbers are in its files."""

from __future__ import annotations

from ..evaluation.intervals import is_share
from ..recipe.comparison import settings_in_words
from ..system.units import duration, size
from .tables import show, table

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
