"""The rows that a run has held out, found again by their content; or those of another file."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np

from ... import base_model, data
from ...evaluation.asked import BUILT_IN
from ...recipe import Data, tasks
from ...system.errors import InputError
from ...system.events import note
from ..opening.chosen_task import encoder_of


def held_out_rows(subject, data_file=None):
    """Return the data.Rows that a Subject is evaluated on: those that its run has held out, or those of `data_file`.

    Raises:
        InputError: there are none, or some of those that the run has held out are no longer in their file.
    """
    recipe, tokenizer, task = subject.recipe, subject.tokenizer, base_model.task_of(subject.model)
    if data_file is not None:
        settings = recipe.data.model_dump() if recipe else {"max_length": 2**30}
        if task.HAS_CLASSES:  # a text that is cut has a class still
            settings["labels"] = list(task.labels_of(subject.model.config))
        else:
            settings["overlong"] = "error"
        section = Data.of_file(data_file, settings)
        encoder = encoder_of_file(section, task.NAME, recipe)
        rows = data.Rows(data.load(section.train, tokenizer, section, seed=0, encoder=encoder))
        for part in rows.parts:
            if count := part.summary.get(data.labels.BY_PLACE):
                places = ", ".join(f"{number} is {name}" for number, name in enumerate(section.labels[:5]))
                note(f"{part.path}: {count:,} rows have a number for their class, which is its place: {places}")
        return rows
    if recipe is None or not (recipe.data.eval or recipe.data.eval_fraction):
        raise InputError("no held-out rows: the recipe has neither data.eval nor data.eval_fraction; give --data FILE")
    section, run = recipe.data, subject.run
    sources = section.eval or section.train
    recorded = run.environment().get("held_out")
    if not recorded:
        raise InputError(f"{run.environment_file}: does not say which rows were held out; give --data FILE")
    encoder = encoder_of(task.NAME, recipe.objective)
    rows = data.Rows(data.load(sources, tokenizer, section, recipe.seed_of_rows, encoder))
    keys, found = np.array([int(key, 16) for key in recorded], np.uint64), rows.keys
    missing = int((~np.isin(keys, found)).sum())
    if missing:
        files = ", ".join(str(part.path) for part in rows.parts)
        raise InputError(
            f"{missing:,} of the {len(keys):,} held-out rows of {run.path} are no longer in {files}, so the score would be "
            "on other rows. Restore the file, or evaluate on other rows with --data FILE"
        )
    return rows[np.isin(found, keys)]


def encoder_of_file(section, task, recipe=None):
    """Return what makes examples of the rows of a file, in a section data, by their columns or the first row: pairs, unpaired
    answers, or those of the task. recipe: of a run; one trained on unpaired answers reads labels as in training."""
    if tasks.has_classes(task):
        return encoder_of(task)
    pair, ignored = {data.preference.CHOSEN, data.preference.REJECTED}, section.ignore_keys or ()
    files = data.Preferences.open_source(section.train[0])
    first = next((row.value for file in files for row in file.rows() if row.problem is None), None)
    if pair <= section.columns.keys() if section.columns else data.preference.is_pair(first, ignored):
        return data.Preferences
    is_unpaired = recipe is not None and encoder_of(recipe.task, recipe.objective) is data.UnpairedPreferences
    labelled = data.unpaired.is_unpaired(first, ignored) or (is_unpaired and data.unpaired.has_label(first, ignored))
    if data.unpaired.LABEL in (section.columns or ()) or (labelled and (is_unpaired or not section.columns)):
        return data.UnpairedPreferences
    return data.Supervised


def usual_rows(task):
    """Return how many rows are measured of a model of this task, by its name; None: all, where an answer is one forward pass."""
    return None if tasks.has_classes(task) else _ANSWERS


def score_name(task, max_rows=None, files=()):
    """Return the name in evals/ of a score on so many of a run's held-out rows, or of those of `files`, (path, sha256) of each;
    None for the run's own: on its held-out rows, as many as usual."""
    if max_rows == usual_rows(task):
        max_rows = None
    if not files:
        return None if max_rows is None else joined_name("held-out", max_rows)
    [(path, digest), *others] = files
    stem = Path(path).stem
    if others:  # a folder or a glob: named by all of them, so that it is another score when any changes
        stem = Path(os.path.commonpath([path for path, _ in files])).name or "rows"
        digest = hashlib.sha256("".join(digest for _, digest in files).encode()).hexdigest()
    return joined_name(name_of(stem, digest), max_rows)


def name_of(stem, digest):
    """Return what a score on a file is named by. A name of 255 bytes is as much as a disk takes, and more is added to this."""
    return f"{os.fsencode(stem)[:100].decode(errors='ignore')}-{digest[:8]}"


def name_of_file(file, task, max_rows=None):
    """Return the score_name of a data file, or of the files of a folder or glob, which it reads."""
    section = Data.of_file(file, {})
    found = encoder_of_file(section, task).open_source(section.train[0])
    return score_name(task, max_rows, [(str(one.path), one.digest()) for one in found])


def joined_name(name, max_rows, *words):
    return "-".join([name, *words, *([] if max_rows is None else [f"{max_rows}-rows"])])


def name_in_all(runs, name=None):
    """Return the name in evals/ of the score that all RunDirs have on the rows of the score `name`: that itself where they do,
    else of the most of its first rows (`qlora eval RUN --max-rows N`); `name` where there is none either."""
    if all(run.scores(name) is not None for run in runs):
        return name
    in_all = set.intersection(*(counts_of(run, name) for run in runs))
    return joined_name(name or "held-out", max(in_all)) if in_all else name


def counts_of(run, name=None):
    """Return on how many of its first rows alone a RunDir has a score `name`: {N of `qlora eval RUN --max-rows N`}."""
    named = re.compile(re.escape(name or "held-out") + r"-(\d+)-rows")
    return {int(found[1]) for path in run.evals.glob("*.json") if (found := named.fullmatch(path.stem))}


def general_rows(subject, file):
    """Return the data.Rows of `file` that a Subject's forgetting is measured on, cut after 2,048 tokens or the last position."""
    positions = base_model.num_positions(subject.model.config) or _LONGEST
    section = Data.of_file(file, {"max_length": min(positions, _LONGEST), "overlong": "truncate"})
    rows = data.Rows(data.load(section.train, subject.tokenizer, section, seed=0))
    if not len(rows):
        raise InputError(f"no rows to measure forgetting on in {file}")
    base_model.refuse_rows(rows, subject.model.config)
    return rows


def refuse_missing(file):
    """Raise InputError where the rows are not there that forgetting is to be measured on. file: as Asked.forgetting."""
    if file not in (None, BUILT_IN):
        for found in data.sources.open_source(Data.of_file(file, {}).train[0]):
            next(iter(found.rows()), None)


_LONGEST = 2048
_ANSWERS = 100
