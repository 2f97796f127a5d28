"""qlora adapters: what has been trained, in which folder, and how good it is."""

from __future__ import annotations

import time
from pathlib import Path

from rich.text import Text

from ..evaluation.asked import cut_in_words
from ..evaluation.intervals import in_words
from ..recipe.comparison import settings_in_words
from ..runs.listing import listed
from ..system.errors import InputError
from ..terminal import shown
from ..terminal.tables import show, text_table

_LOSSES = {"loss": "loss", "held-out loss": "eval_loss"}


@shown()
def adapters(folder="runs") -> list:
    """Return what is known of every comparison, run, checkpoint and adapter under `folder`, newest first.

    Each is as runs.listing.listed says.

    Raises:
        InputError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; give the folder that holds your runs (`qlora train RECIPE` makes one)")
    found = listed(folder)
    _show(folder, found)
    return found


def _show(folder, found):
    show(f"{len(found)} in {folder}")
    for one in found:
        if one["kind"] == "comparison":
            _show_comparison(one)
        elif one["comparison"] is None:
            _show_run(one)


def _show_run(one):
    base = f" on {Path(one['base']).name}" if one["base"] else ""
    trained = [(one["kind"] or "") + base, "" if one["steps"] is None else f"{one['steps']:,} steps", _when(one)]
    scores = [f"{name} {one[key]:.4f}" for name, key in _LOSSES.items() if one[key] is not None]
    scores += [
        f"{name.replace('_', ' ')} {in_words(metric, 0, name)}" for name, metric in (one["metrics"] or {}).items()
    ]
    cut = cut_in_words(one["extract"])
    show("")
    show(Text(one["path"]))  # whole, to be pasted
    show(f"          {', '.join(filter(None, trained))}")
    if scores:
        show(f"          {', '.join(scores)}{cut}")
    if one["checkpoints"]:
        steps = [f"{kept['step']:,}{' (best)' * kept['best']}" for kept in one["checkpoints"]]
        show(f"          checkpoints of steps {', '.join(steps)}")
    if one["state"] != "finished":
        show(f"          {one['state']}")


def _show_comparison(one):
    """Show a comparison with a line for each of its trainings, whose folders are named in its files."""
    found = one["comparison"]
    show("")
    show(Text(one["path"]))
    show(f"          comparison, {one['state']}, {_when(one)}")
    if found is None:
        return
    rows = [
        [row["variant"], settings_in_words(row["settings"]), str(row["seed"]), _score(found["metric"], row),
         {True: "best", None: ""}.get(row["best"], "may be as good as the best")] for row in found["rows"]
    ]  # fmt: skip
    if rows:
        text_table("", ["variant", "setting", "seed", found["metric"].replace("_", " "), ""], rows)


def _score(metric, row):
    if row["status"] != "done" or row["score"] is None:
        return row["status"]
    return in_words(row["score"], 0, metric)


def _when(one):
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(one["time"]))
