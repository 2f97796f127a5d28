"""What a report is made of: runs, a comparison, exports, told apart; all that is known of them as one value."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from ...evaluation.intervals import OF_LOSS
from ...exporter import REPORT
from ...recipe.comparison import FILE, RESULT, Comparison
from ...runs import record
from ...runs.environment import OURS, version_of
from ...runs.folder import RunDir, refuse_recipe
from ...system import files
from ...system.errors import InputError
from ..comparing import differences
from . import verdicts
from .reported_run import command, curves, facts

KIND = "qlora report"  # of the value, and of the page's <meta name="generator">
_WHOLE = 8  # runs whose own chapters a page has; the others are in its tables and curves
_RUNS = 60  # in its curves: of a comparison the best
_COLUMNS = 12  # runs whose settings are put side by side


def gather(targets) -> dict[str, Any]:
    """Return all that a page says, as plain JSON values.

    targets: paths of run folders, of one comparison (its folder or its YAML file), and of exported models.

    Raises:
        InputError: one of them is none of these or is damaged; two are the same.
    """
    runs, exports, compared = _sorted(targets)
    # a comparison's own chapters are those of its best settings; all runs are in its tables and curves
    best_first = runs if compared is None else _best_first(runs, compared)
    chosen = best_first[:_WHOLE]
    num_runs, runs = len(runs), runs if len(runs) <= _RUNS else best_first[:_RUNS]
    most = {1: (400, 200, (6, 8), 20), 2: (300, 100, (4, 6), 10)}.get(len(chosen), (200, 40, (2, 4), 5))
    if exports and len(runs) > 1:
        raise InputError(f"{exports[0]}: an export can be named beside one run only, its own")
    found = {
        "kind": KIND,
        "version": version_of(OURS),
        "made": time.strftime("%Y-%m-%d %H:%M", time.localtime()),
        "command": command("report", *targets),
        "comparison": compared,
        "runs": [facts(run, exports, *most) for run in chosen],
        "runs_left_out": num_runs - len(chosen),
        "curves": _curves(runs, compared) if len(runs) > 1 else [],
        "names": [run.path.name for run in runs],
        "differences": differences.between(*runs) if 1 < len(runs) <= _COLUMNS else {},
        "differences_command": command("compare", *(run.path for run in runs)) if len(runs) == 2 else None,
    }
    return _plain(found)


def _sorted(targets):
    """Return ([RunDir], [folder of an export], comparison.json or None)."""
    runs: dict[Path, RunDir] = {}
    exports, compared = [], None
    for target in map(Path, targets):
        folder = _folder_of_comparison(target)
        if folder is not None:
            if compared is not None:
                raise InputError(f"{target}: a page has one comparison; write a page for each")
            compared = _comparison(folder)
            for row in compared["rows"]:
                run = RunDir(folder / Path(row["run"]).name)
                if run.recipe_file.is_file():
                    runs[run.path.resolve()] = run
        elif RunDir.is_run(target):
            if target.resolve() in runs:
                raise InputError(f"{target}: named twice")
            runs[target.resolve()] = RunDir(target)
        elif (target / REPORT).is_file():
            exports.append(target)
        elif not target.exists():
            raise InputError(f"no run at {target}; `qlora adapters` lists what there is")
        else:
            raise InputError(
                f"{target}: no run (recipe.yaml), no comparison ({RESULT}) and no export ({REPORT}); "
                "`qlora adapters` lists what there is"
            )
    if not runs and compared is None:
        raise InputError(f"{exports[0]}: is only an export; name its run too")
    if len(runs) > _RUNS and compared is None:
        raise InputError(f"{len(runs)} runs; a page has {_RUNS} at most")
    return list(runs.values()), exports, compared


def _folder_of_comparison(target):
    if target.is_dir():
        there = (target / RESULT).is_file() or (target / FILE).is_file()
        return target if there and not RunDir.is_run(target) else None
    if target.suffix in (".yaml", ".yml") and target.is_file():
        refuse_recipe(target)
        return Path(Comparison.load(target).output_dir)
    return None


def _comparison(folder):
    file = folder / RESULT
    if not file.is_file():
        raise InputError(f"{folder}: no {RESULT} yet; it is written after the first training: qlora compare")
    found = files.read_object(file)
    try:
        named = {"metric", "rows", "summary", "notes", "name", "command", "lower_is_better"}
        if missing := sorted(named - found.keys()):
            raise KeyError(missing[0])
        for one in found["rows"]:
            _ = one["run"], one["variant"], one["settings"], one["status"], one["metrics"]
        for one in found["summary"]:
            _ = one["variant"], one["mean"], one["low"], one["high"], one["chosen"]
    except (LookupError, TypeError) as error:
        raise InputError(f"{file}: {error!r}; damaged; write it again: qlora compare --resume") from None
    return found | {"folder": str(folder), "verdicts": verdicts.of_comparison(found)}


def _best_first(runs, compared):
    """Return runs in the order of their scores, those that did not end well last."""
    metric, lower = compared["metric"], compared["lower_is_better"]

    def rank(run):
        row = next((one for one in compared["rows"] if Path(one["run"]).name == run.path.name), {})
        value = row.get(metric) if metric in OF_LOSS else row.get("metrics", {}).get(metric, {}).get("value")
        return math.inf if value is None else (value if lower else -value)

    return sorted(runs, key=rank)


def _curves(runs, compared):
    """Return [{"name", "path", "group", "curves"}] of all runs, with few points each. group: whose colour a run has: its own, or,
    where a comparison has many runs, its variant's."""
    most = 150 if len(runs) <= 12 else 60
    variants = (
        {}
        if compared is None or len(runs) <= 8
        else {Path(row["run"]).name: row["variant"] for row in compared["rows"]}
    )
    return [
        {
            "name": run.path.name,
            "path": str(run.path),
            "group": variants.get(run.path.name, run.path.name),
            "curves": curves(record.read(run), most),
        }
        for run in runs
        if run.metrics_file.is_file()
    ]


def _plain(value):
    """Return `value` as JSON and UTF-8 can hold it: numbers that are not finite are None, half characters are U+FFFD."""
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value
