"""qlora adapters: what has been trained, in which folder, and how good it is."""

from __future__ import annotations

import time
from pathlib import Path

from rich.text import Text

from ..evaluation.intervals import in_words
from ..runs.listing import listed
from ..system.errors import InputError
from ..terminal import shown
from ..terminal.tables import show

_LOSSES = {"loss": "loss", "held-out loss": "eval_loss"}


@shown()
def adapters(folder="runs") -> list:
    """Return what is known of every run, checkpoint and adapter under `folder`, newest first.

    Each is {"path", "kind", "base", "state", "steps", "loss", "eval_loss", "metrics", "time"}; what is not known is None.
    state: "finished", "unfinished", or what is wrong with it in words.

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
        base = f" on {Path(one['base']).name}" if one["base"] else ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["time"]))
        trained = [(one["kind"] or "") + base, "" if one["steps"] is None else f"{one['steps']:,} steps", when]
        scores = [f"{name} {one[key]:.4f}" for name, key in _LOSSES.items() if one[key] is not None]
        scores += [f"{name.replace('_', ' ')} {in_words(metric, 0)}" for name, metric in (one["metrics"] or {}).items()]
        show("")
        show(Text(one["path"]))  # whole, to be pasted
        show(f"          {', '.join(filter(None, trained))}")
        if scores:
            show(f"          {', '.join(scores)}")
        if one["state"] != "finished":
            show(f"          {one['state']}")
