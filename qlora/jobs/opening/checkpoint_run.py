"""A checkpoint of a run as a run of its own, whose training ended there: for export, eval and chat."""

from __future__ import annotations

import contextlib
import gc
import re
import shutil
import tempfile
from pathlib import Path

from ...runs.checkpoints import Checkpoints, read_tensors
from ...runs.folder import RunDir
from ...system.errors import InputError
from . import model_to_train, resumed_run
from .prepared_data import prepare


def run_of(folder):
    """Return the RunDir that a folder RUN/checkpoints/step-N is of; None of any other folder."""
    folder = Path(folder)
    inside = folder.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", folder.name)
    return RunDir(folder.parent.parent) if inside and RunDir.is_run(folder.parent.parent) else None


def run_at(target):
    """Return the RunDir that folder `target` is, or is a checkpoint of; None of anything else."""
    return RunDir(target) if RunDir.is_run(target) else run_of(target)


@contextlib.contextmanager
def finished(target, what_for):
    """Yield the finished run in folder `target`, or what `as_run` makes of a checkpoint there.

    Raises:
        InputError: there is neither; or as `as_run` does.
    """
    run = run_of(target)
    if run is None:
        yield RunDir.open(target)
        return
    with as_run(target, run, what_for) as made:
        yield made


@contextlib.contextmanager
def as_run(folder, run, what_for):
    """Yield a finished run with the adapter of checkpoint `folder` of `run`; it goes away with the block.

    The model is made as for training, from the recipe, the data and the base of the run: a checkpoint has nothing but numbers.
    what_for: it is opened, in words.

    Raises:
        InputError: the checkpoint is damaged, or recipe, data or base are no longer those of the run.
    """
    folder, environment = Path(folder), run.environment()
    kept = Checkpoints(run.checkpoints, environment.get("id"))
    if not folder.is_dir():
        steps = ", ".join(f"step-{step}" for step, _ in kept.listed())
        raise InputError(f"no checkpoint at {folder}; {run.checkpoints} has {steps or 'none'}")
    kept.verify(folder)
    with tempfile.TemporaryDirectory() as place:
        made = RunDir(Path(place) / f"{run.path.resolve().name}-{folder.name}")
        made.path.mkdir()
        resumed = resumed_run.Resumed(run, kept, folder, environment, (), what_for=what_for)
        try:
            for file in (run.recipe_file, run.environment_file, run.data_report_file, run.proof_rows_file):
                shutil.copyfile(file, made.path / file.name)
            lines = run.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}; the run folder is damaged") from None
        made.metrics_file.write_text("".join(lines[: resumed.state["lines"]]), encoding="utf-8")
        _save_adapter(resumed, made)
        yield made


def _save_adapter(resumed, made):
    """Write what a Resumed run would go on with into the run folder `made`."""
    from ...training.trained_parameters import Trained

    prepared = prepare(resumed.run.recipe())
    fingerprint = resumed_run.of_recipe(prepared.recipe, prepared)
    resumed.refuse_changes(fingerprint)
    opened = model_to_train.open_trainable(prepared, fingerprint, resumed, resumed.tokens_per_micro_batch)
    Trained(opened.model).restore(read_tensors(resumed.checkpoint), resumed.state)
    model_to_train.save_adapter(made, prepared, opened)
    del opened
    gc.collect()  # peft models hold themselves in cycles, and the base is loaded again
