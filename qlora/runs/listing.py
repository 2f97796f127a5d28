"""What has been trained under a folder: runs, and adapters of other tools."""

from __future__ import annotations

from pathlib import Path

from .. import methods
from ..system.errors import InputError, QLoRAError
from . import record
from .folder import RunDir


def listed(folder) -> list:
    """Return what is known of every run, checkpoint and adapter under `folder`, newest first.

    Each is {"path", "kind", "base", "state", "steps", "loss", "eval_loss", "metrics", "time"}; what is not known is None.
    state: "finished", "unfinished", or what is wrong with it in words.
    """
    folder = Path(folder)
    runs = {path.parent for path in [folder / "recipe.yaml", *folder.rglob("recipe.yaml")] if path.is_file()}
    own = {RunDir(run).adapter for run in runs}
    others = {path.parent for path in folder.rglob(methods.CONFIG)} - own
    found = [*map(_of_run, runs), *(_entry(path) for path in others)]
    return sorted(found, key=lambda one: -one["time"])


def _entry(path, folder=None):
    """Return the entry of the adapter in `path`, as part of run `folder` where it is one."""
    entry = dict.fromkeys(("kind", "base", "steps", "loss", "eval_loss", "metrics"))
    entry |= {"path": str(folder or path), "state": "finished", "time": (folder or path).stat().st_mtime}
    try:
        config = methods.read_config(path)
        described = methods.describe(config)
        entry["kind"] = f"{described.kind} {described.size}"
        entry["base"] = config.get("base_model_name_or_path")
        entry["time"] = path.stat().st_mtime
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
        for line in record.read(run):
            entry["steps"] = line.step
            entry["loss"] = getattr(line, "loss", entry["loss"])
            entry["eval_loss"] = getattr(line, "eval_loss", entry["eval_loss"])
        if (scores := run.scores()) is not None:
            entry["metrics"] = scores["metrics"]
    except (OSError, ValueError, KeyError, QLoRAError) as error:
        if entry["state"] == "finished":
            entry["state"] = f"damaged: {str(error).splitlines()[0]}"
    return entry
