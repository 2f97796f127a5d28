"""What came of a comparison: a row for each training, a summary over seeds, and what the words in it mean."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from statistics import mean

import numpy as np

from ...evaluation import comparing, intervals
from ...recipe.comparison import NUMBERS
from ...runs.folder import RunDir, extract_of
from ...system.errors import InputError
from ...system.events import note
from . import compared_runs, differences
from .compared_runs import DONE, Folder


def of_folder(folder: Folder, path) -> dict:
    """Return comparison.json of a Folder. path: of the comparison's file, for the command that makes it.

    Raises:
        InputError: two trainings were measured on other rows, or what decides was not measured.
    """
    wanted = folder.comparison
    rows, done = [], []
    for entry in folder.entries:
        status, message = folder.state(entry)
        row = {"variant": entry.variant, "settings": dict(entry.settings), "seed": entry.seed}
        rows.append(row | compared_runs.row_of(folder.run(entry), folder.scores, status, message))
        if status == DONE:
            done.append((entry, rows[-1], compared_runs.measured(folder.run(entry), folder.scores)))
    return {
        "name": Path(path).stem,
        "metric": wanted.metric,
        "metrics": [name for name in wanted.metrics if name != wanted.metric],
        "lower_is_better": wanted.metric in intervals.OF_LOSS,
        "command": shlex.join(["qlora", "compare", str(path)]),
        "rows": rows,
        "summary": _summary(wanted.metric, done) if done else [],
        "merged_latency_seconds": None,
        "notes": [*_notes(wanted, rows), *_mixed(done)],
    }


def _summary(metric, done):
    first = done[0][2]
    value = compared_runs.value_of(metric, first)
    if value is None:
        raise InputError(
            f"metric: {metric} was not measured; there are {', '.join(['loss', *first.result['metrics']])}"
        )
    settings: dict = {}
    for entry, row, found in done:
        if found.rows != first.rows:
            raise InputError(
                f"{row['run']} was measured on other rows than {done[0][1]['run']}; evaluate both again: qlora eval RUN"
            )
        if metric not in found.parts:
            raise InputError(
                f"{row['run']} was evaluated without {metric}; evaluate it again: qlora eval {shlex.quote(row['run'])}"
            )
        key = (entry.variant, json.dumps(dict(entry.settings), sort_keys=True))
        settings.setdefault(key, []).append((entry, row, found))
    runs = [
        comparing.Runs(
            group[0][0].variant, group[0][0].settings, np.stack([found.parts[metric] for *_, found in group])
        )
        for group in settings.values()
    ]
    found = comparing.summary(runs, value, metric in intervals.OF_LOSS)
    for one, group in zip(found, settings.values(), strict=True):
        rows = [row for _, row, _ in group]
        one |= {name: _mean([row[name] for row in rows]) for name in NUMBERS}
        names = dict.fromkeys(name for row in rows for name in row["metrics"])
        one["metrics"] = {name: _mean([row["metrics"].get(name, {}).get("value") for row in rows]) for name in names}
    return found


def _mixed(done):
    """Return a note where trainings ran on other devices or with other versions of the libraries, as after an update."""
    runs = {row["run"]: RunDir(row["run"]) for _, row, _ in done}
    differing = [name for name, *_ in differences.between(*runs.values())["versions"]] if runs else []
    if not differing:
        return []
    return [
        f"The trainings differ in {', '.join(differing)} too (qlora compare RUN RUN), so it is not the variants alone."
    ]


def _mean(values):
    there = [value for value in values if value is not None]
    return mean(there) if there else None


def _notes(wanted, rows):
    """Return in words what the numbers mean, and what they do not say."""
    seeds = {row["seed"] for row in rows}
    notes = [
        f"{wanted.metric.replace('_', ' ')}: mean over {len(seeds)} seed{'s' if len(seeds) > 1 else ''} on "
        f"the same held-out rows, with the 95 % interval over rows and seeds; the spread is the standard "
        "deviation over seeds.",
        '"best" is ahead of every other variant by more than chance on the same rows; "no difference shown" is not proof that '
        "there is none.",
    ]
    if any(row["settings"] for row in rows):
        notes.append(
            "The setting of a variant was chosen by the same rows that its score is of, which flatters all of them alike."
        )
    if len(seeds) == 1:
        notes.append("With one seed, what differs from one training to the next is not in the intervals.")
    notes.append(
        "time: of the training, evaluations and checkpoints included, on this machine; a token: of one answer, by itself."
    )
    return notes


def paired(one, other, name=None) -> dict:
    """Return {metric: {"value", "low", "high"}} of other minus one, where both runs were measured on the same rows; else {}.
    name: of the score, see RunDir.score_files."""
    try:
        left, right = (compared_runs.measured(run, name) for run in (one, other))
    except InputError as error:
        note(str(error))
        return {}
    if left.rows != right.rows:
        note("measured on different rows: no paired difference")
        return {}
    names, cut = [name for name in left.parts if name in right.parts], [extract_of(one.result) for one in (left, right)]
    if cut[0] != cut[1]:
        one_cut, other_cut = ("nothing" if one is None else repr(one) for one in cut)
        note(f"answers were cut by --extract {one_cut} and {other_cut}: no change of what is measured on them")
        names = [name for name in names if name in intervals.OF_LOSS]
    found = {}
    for name in names:
        try:
            value = compared_runs.value_of(name, left)
        except InputError as error:  # measured elsewhere, with an extra that is not installed here
            note(f"no change of {name}: {error}")
            continue
        found[name] = intervals.change(value, left.parts[name], right.parts[name])
    return found
