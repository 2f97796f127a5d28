"""The rows that a run has held out, found again by their content; or those of another file."""

from __future__ import annotations

import numpy as np

from .. import base_model, data
from ..recipe import Data
from ..system.errors import InputError
from .chosen_task import encoder_of


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
        encoder = encoder_of(task.NAME) if task.HAS_CLASSES else _encoder_for(section, recipe)
        return data.Rows(data.load(section.train, tokenizer, section, seed=0, encoder=encoder))
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


def _encoder_for(section, recipe):
    """Return the Encoder of the rows of a file, in the recipe's section data: pairs, judged answers (which pairs are too, for a
    run that was trained on them), or supervised rows; by their columns, or the first row."""
    judges = recipe is not None and encoder_of(recipe.task, recipe.objective) is data.Judgements
    of_pairs = data.Judgements if judges else data.Preferences
    pair, ignored = {data.preference.CHOSEN, data.preference.REJECTED}, section.ignore_keys or ()
    if section.columns is not None:
        named = section.columns.keys()
        return of_pairs if pair <= named else data.Judgements if data.judged.LABEL in named else data.Supervised
    files = data.Preferences.open_source(section.train[0])
    first = next((row.value for file in files for row in file.rows() if row.problem is None), None)
    if data.preference.is_pair(first, ignored):
        return of_pairs
    return data.Judgements if data.judged.is_judged(first, ignored) else data.Supervised


def held_out_rows_name(max_rows):
    """Return the name in evals/ of a score on so many of a run's held-out rows; None where max_rows is None, as usual."""
    return None if max_rows is None else f"held-out-{max_rows}-rows"


def general_rows(subject, file):
    """Return the data.Rows of `file` that a Subject's forgetting is measured on, cut after 2,048 tokens or the last position."""
    positions = base_model.num_positions(subject.model.config) or _LONGEST
    section = Data.of_file(file, {"max_length": min(positions, _LONGEST), "overlong": "truncate"})
    rows = data.Rows(data.load(section.train, subject.tokenizer, section, seed=0))
    if not len(rows):
        raise InputError(f"no rows to measure forgetting on in {file}")
    base_model.refuse_rows(rows, subject.model.config)
    return rows


_LONGEST = 2048
