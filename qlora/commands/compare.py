"""qlora compare: variants x settings x seeds on one task, in one table; or two runs side by side."""

from __future__ import annotations

import shlex
import time

from .. import base_model
from ..jobs.comparing import comparison_table, differences
from ..jobs.comparing.compared_runs import DONE, TO_DO, UNFINISHED, Folder, measured, row_of, train_one
from ..jobs.evaluating import eval_rows, merged_latency
from ..jobs.opening.prepared_data import prepare
from ..jobs.planning.planned_training import plan_training
from ..pages import comparison as page
from ..recipe.comparison import RESULT, Comparison
from ..runs.folder import RunDir
from ..system import launched
from ..system.errors import DoesNotFit, InputError, Interrupted
from ..system.events import Found, emit, note
from ..system.storage import locked, write_json, write_text
from ..system.units import duration, latency, size
from ..terminal import shown
from ..terminal.comparison import show_comparison, show_two_runs
from ..terminal.tables import table


@shown()
def compare(path, overrides=(), resume=False, dry_run=False) -> dict:
    """Train and evaluate all that the comparison in the YAML file `path` names; return its comparison.json.

    overrides: `field=value` laid over the comparison. resume: go on with the one in its output_dir, at any moment of which it may
    have been ended; what failed is tried again. dry_run: only plan. What did not fit, diverged or failed is a row that says so.
    Writes comparison.json, .csv, .md and .png into output_dir, anew after each training.

    Raises:
        InputError: the comparison or one of its recipes is wrong, or output_dir holds something else.
        Interrupted: by a signal; `resume` goes on.
    """
    launched.refuse_several(f"qlora compare {shlex.quote(str(path))}")
    folder = Folder(Comparison.load(path, overrides))
    planned = _plan(folder)
    if dry_run:
        return {"planned": planned}
    folder.refuse_used(resume)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir {folder.path}: {error.strerror}; choose another folder") from None
    with locked(folder.lock_file, f"output_dir {folder.path}", "set output_dir=ANOTHER_FOLDER"):
        folder.begin()
        folder.try_again()
        try:
            _train_all(folder, path, {one["name"]: one for one in planned})
            found = _found(folder, path, last=True)
            show_comparison(found)
            emit(Found(found))
            _write(folder, found)
        except Interrupted as stopped:
            command = shlex.join(["qlora", "compare", str(path), *overrides, "--resume"])
            raise Interrupted(stopped.number, f"stopped; what is there is kept; go on with:  {command}") from None
    note(f"tables and pictures in {folder.path}: comparison.md, .csv, .json, .png")
    return found


def _plan(folder):
    """Return [{"name", "variant", "fits", "peak_bytes", "hours", "message"}] of each training, and show them."""
    found, known = [], {}
    device = base_model.default_device()
    for entry in folder.entries:
        changed = {
            "training": entry.recipe.training.model_copy(update={"seed": 0, "learning_rate": 1e-4}),
            "output_dir": "x",
        }
        if entry.after is not None:  # what it starts from has still to be trained, and takes the same room as a new one
            changed["model"] = entry.recipe.model.model_copy(update={"adapter_name_or_path": None})
        recipe = entry.recipe.model_copy(update=changed)
        key = recipe.to_yaml()
        if key not in known:  # what a training costs does not depend on its seed or learning rate
            try:
                plan = plan_training(prepare(recipe), device)
                hours = plan.plan.hours if plan.plan else None
                known[key] = {
                    "fits": True,
                    "peak_bytes": plan.predicted_bytes,
                    "hours": hours,
                    "message": plan.why_none,
                }
            except DoesNotFit as error:
                known[key] = {"fits": False, "peak_bytes": None, "hours": None, "message": str(error)}
        found.append({"name": entry.name, "variant": entry.variant, **known[key]})
    rows = [
        [one["name"], "?" if one["peak_bytes"] is None else size(one["peak_bytes"]), "yes" if one["fits"] else "no",
         "" if one["hours"] is None else duration(3600 * one["hours"])] for one in found
    ]  # fmt: skip
    table(f"{len(found)} trainings", ["", "planned peak", "fits", "planned time"], rows)
    if any(one["hours"] is None for one in found):
        note("How long it takes on this device is known after the first training.")
    return found


def _train_all(folder, path, planned):
    """Train what is to be trained, one after another; write the table after each."""
    entries = [entry for entry in folder.entries if folder.state(entry)[0] in (TO_DO, UNFINISHED)]
    done, begun = len(folder.entries) - len(entries), time.monotonic()
    for number, entry in enumerate(entries):
        plan = planned[entry.name]
        if not plan["fits"]:
            folder.failed(entry, "does not fit", plan["message"])
            continue
        left = ""
        if number:
            left = f", about {duration((time.monotonic() - begun) / number * (len(entries) - number))} left"
        note(f"[{done + number + 1}/{len(folder.entries)}] {entry.name}{left}")
        train_one(folder, entry)
        _write(folder, _found(folder, path))


def _found(folder, path, last=False):
    """Return the comparison.json of what there is. last: nothing more will be trained."""
    found = comparison_table.of_folder(folder, path)
    runs = [RunDir(row["run"]) for row in found["rows"] if row["status"] == DONE]
    prompt = measured(runs[0], folder.scores).rows[0][0].get("prompt") if runs and last else None
    if prompt is not None:
        seconds = found["merged_latency_seconds"] = merged_latency.seconds_a_token(runs[0], prompt)
        if seconds is not None:
            found["notes"].append(
                f"Merged into a whole model, a token of an answer takes {latency(seconds)} here, whatever the method."
            )
    return found


def _write(folder, found):
    """Write the table and its pictures into the folder."""
    if any(row["status"] == DONE for row in found["rows"]):
        page.draw(folder.path / "comparison.png", found)
    write_text(folder.path / "comparison.csv", page.as_csv(found))
    write_text(folder.path / "comparison.md", page.as_markdown(found))
    write_json(folder.path / RESULT, found)


@shown()
def compare_runs(one, other, data=None) -> dict:
    """Return {"rows", "differences", "change"} of two finished runs, and show them side by side.

    rows: as of a comparison, with "judge", as of `evaluate`, None where no judge was asked. differences: of recipe, data,
    versions and base model: [name, of one, of the other]. change: of each metric from one to the other, where both were measured
    on the same rows. data: the file of them, as of `evaluate`; None: those that they have held out. Runs that were evaluated on
    the first N of them only are compared on these.

    Raises:
        InputError: one of them is no finished run, or its folder is damaged; or it was not evaluated on `data`.
    """
    runs = [RunDir.open(path) for path in (one, other)]
    name = None if data is None else eval_rows.name_of_file(data, runs[0].recipe().task)
    whole, name = name, eval_rows.name_in_all(runs, name)
    if name != whole:
        note(f"on as many of the rows as both were evaluated on: evals/{name}.json")
    if missing := [run for run in runs if name is not None and run.scores(name) is None]:
        raise InputError(
            f"{missing[0].path}: not evaluated on {data} yet; run:  "
            + shlex.join(["qlora", "eval", str(missing[0].path), "--data", str(data)])
        )
    rows = [row_of(run, name) | {"judge": (run.scores(name) or {}).get("judge")} for run in runs]
    differing = differences.between(*runs)
    change = comparison_table.paired(runs[0], runs[1], name)
    show_two_runs((str(one), str(other)), rows, differing, change)
    return {"rows": rows, "differences": differing, "change": change}
