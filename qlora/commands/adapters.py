"""qlora adapters: what has been trained, in which folder, and how good it is."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.text import Text

from .. import methods
from ..runs.folder import RunDir
from ..system.errors import InputError, QLoRAError
from ..terminal import console


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
    runs = {path.parent for path in [folder / "recipe.yaml", *folder.rglob("recipe.yaml")] if path.is_file()}
    own = {run / "adapter" for run in runs}
    others = {path.parent for path in folder.rglob(methods.CONFIG)} - own
    found = [*map(_of_run, runs), *(_entry(path) for path in others)]
    found.sort(key=lambda one: -one["time"])
    _show(folder, found)
    return found


def _entry(path, folder=None):
    """Return the entry of the adapter in `path`, as part of run `folder` where it is one."""
    entry = dict.fromkeys(("kind", "base", "steps", "loss", "eval_loss", "metrics"))
    entry |= {"path": str(folder or path), "state": "finished", "time": (folder or path).stat().st_mtime}
    try:
        config = methods.read_config(path)
        described = methods.describe(config)
        entry["kind"] = f"{described.kind} {described.size}"
        entry["base"] = config.get("base_model_name_or_path")
        entry["time"] = (path / methods.CONFIG).stat().st_mtime
    except InputError as error:
        entry["state"] = f"damaged: {error}"
    except (OSError, KeyError, TypeError) as error:
        entry["state"] = f"damaged: {path / methods.CONFIG}: {error!r}"
    return entry


def _of_run(folder):
    run = RunDir(folder)
    if not run.adapter.is_dir():
        entry = _entry(folder, folder) | {"state": "unfinished", "time": folder.stat().st_mtime}
    else:
        entry = _entry(run.adapter, folder)
    try:
        entry["base"] = run.recipe().model.name_or_path
        for record in run.records():
            entry["steps"] = record["step"]
            entry["loss"] = record.get("loss", entry["loss"])
            entry["eval_loss"] = record.get("eval_loss", entry["eval_loss"])
        if run.eval_file.is_file():
            entry["metrics"] = json.loads(run.eval_file.read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError, QLoRAError) as error:
        if entry["state"] == "finished":
            entry["state"] = f"damaged: {str(error).splitlines()[0]}"
    return entry


def _show(folder, found):
    console.show(f"{len(found)} in {folder}")
    for one in found:
        base = f" on {Path(one['base']).name}" if one["base"] else ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["time"]))
        trained = [(one["kind"] or "") + base, "" if one["steps"] is None else f"{one['steps']:,} steps", when]
        scores = [f"{name} {one[key]:.4f}" for name, key in _LOSSES.items() if one[key] is not None]
        scores += [f"{name.replace('_', ' ')} {value:.0%}" for name, value in (one["metrics"] or {}).items()]
        console.show("")
        console.show(Text(one["path"]))  # whole, to be pasted
        console.show(f"          {', '.join(filter(None, trained))}")
        if scores:
            console.show(f"          {', '.join(scores)}")
        if one["state"] != "finished":
            console.show(f"          {one['state']}")


_LOSSES = {"loss": "loss", "held-out loss": "eval_loss"}
