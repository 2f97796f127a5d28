"""What has been trained under a folder: comparisons, runs, and adapters of other tools."""

from __future__ import annotations

from pathlib import Path

from .. import methods
from ..recipe.comparison import FILE, RESULT
from ..system import files
from ..system.errors import InputError, QLoRAError
from . import record
from .checkpoints import Checkpoints
from .folder import RunDir, extract_of


def listed(folder) -> list:
    """Return what is known of every comparison, run, checkpoint and adapter under `folder`, newest first; the trainings of a
    comparison after it, in its order.

    Each is {"path", "kind", "base", "state", "steps", "loss", "eval_loss", "metrics", "extract", "time", "comparison",
    "checkpoints"}; what is not known is None. extract: of the metrics, see evaluation.asked. checkpoints: of a run,
    [{"step", "best"}], oldest first; best: of the best evaluation, where they are compared. state: "finished", "unfinished", or
    what is wrong with it in words. A comparison has "kind": "comparison", and as "comparison" {"metric", "rows"}; a training of
    one has {"path", "variant", "settings", "seed", "status", "score",
    "best"} there, path: of the comparison; score: of its metric, as {"value", "low", "high"}; best: True, "no difference shown"
    or None.
    """
    folder = Path(folder)
    runs = {path.parent for path in [folder / "recipe.yaml", *folder.rglob("recipe.yaml")] if path.is_file()}
    own = {RunDir(run).adapter for run in runs}
    others = {path.parent for path in folder.rglob(methods.CONFIG) if not _is_partial(path, folder)} - own
    found = {path: _of_run(path) for path in runs} | {path: _entry(path) for path in others}
    groups = []
    for place in {path.parent for name in (RESULT, FILE) for path in folder.rglob(name)} - runs:
        entry, rows = _of_comparison(place)
        trainings = [
            found.pop(place / name) | {"comparison": row} for name, row in rows.items() if place / name in found
        ]
        groups.append([entry, *trainings])
    groups += [[one] for one in found.values()]
    return [one for group in sorted(groups, key=lambda group: -group[0]["time"]) for one in group]


def _is_partial(path, folder):
    """Return whether a file is in a folder that was never finished: of an export or a run that was killed."""
    return any(part.endswith((".partial", ".scratch")) for part in path.relative_to(folder).parts)


def _of_comparison(folder):
    """Return the entry of a comparison, and {name of a training's folder: what the comparison says of it}."""
    entry = dict.fromkeys(("base", "steps", "loss", "eval_loss", "metrics", "extract", "comparison", "checkpoints"))
    entry |= {"path": str(folder), "kind": "comparison", "state": "unfinished", "time": folder.stat().st_mtime}
    file = folder / RESULT
    if not file.is_file():
        return entry, {}
    try:
        found = files.read_object(file)
        metric, rows = found["metric"], {}
        best = {(one["variant"], repr(one["settings"])): one["best"] for one in found["summary"]}
        for row in found["rows"]:
            score = row["metrics"].get(metric)
            if score is None and row.get(metric) is not None:  # of a loss
                score = {"value": row[metric], "low": None, "high": None}
            chosen = best.get((row["variant"], repr(row["settings"])))
            said = {key: row[key] for key in ("variant", "settings", "seed", "status")}
            rows[Path(row["run"]).name] = {"path": str(folder), **said, "score": score, "best": chosen}
        done = sum(row["status"] == "done" for row in rows.values())
        state = "finished" if done == len(rows) else f"{done} of {len(rows)} trainings ended well"
        return entry | {"state": state, "comparison": {"metric": metric, "rows": [*rows.values()]}}, rows
    except (LookupError, TypeError, AttributeError, InputError) as error:
        why = str(error) if isinstance(error, InputError) else f"{file}: {error!r}"
        return entry | {"state": f"damaged: {why}"}, {}


def _entry(path, folder=None):
    """Return the entry of the adapter in `path`, as part of run `folder` where it is one."""
    entry = dict.fromkeys(
        ("kind", "base", "steps", "loss", "eval_loss", "metrics", "extract", "comparison", "checkpoints")
    )
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
    found = Checkpoints(run.checkpoints, None).listed()
    return _entry_of(run, folder) | {"checkpoints": [{"step": step, "best": best} for step, best in found]}


def _entry_of(run, folder):
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
            entry["metrics"], entry["extract"] = scores["metrics"], extract_of(scores)
    except (OSError, ValueError, KeyError, QLoRAError) as error:
        if entry["state"] == "finished":
            entry["state"] = f"damaged: {str(error).splitlines()[0]}"
    return entry
