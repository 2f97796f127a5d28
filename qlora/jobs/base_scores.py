"""What a base scores on rows that another run on the same base was evaluated on: it is not asked again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..evaluation import answer_metrics
from ..evaluation.intervals import MARGIN
from ..evaluation.preferences import ACCURACY
from ..evaluation.scores import LOSS, Score
from ..runs.folder import RunDir
from ..system.errors import InputError
from . import compared_runs


def of_another_run(path, run, after: Score, asked, name, cut=None) -> Score:
    """Return the Score of the base of `run`, of what the evaluated run in `path` has of it "before" its training.

    after: the Score of `run`. asked: what each row asks, as JSON. name: of the score, see RunDir.score_files. cut: what makes of
    an answer the part that is compared; None: all of it.

    Raises:
        InputError: the other run has another base, or was evaluated on other rows or not at all; or its folder is damaged.
    """
    other = RunDir.open(path)
    for what, then in _of_the_base(other).items():
        if then != _of_the_base(run)[what]:
            raise InputError(f"--before-of {path}: its {what} is not that of {run.path}; leave it out")
    then = compared_runs.measured(other, name, "before")
    expected: Sequence[str | None] = after.references or [None] * len(asked)
    if then.rows != list(zip(asked, expected, strict=True)):
        raise InputError(f"--before-of {path}: was evaluated on other rows; leave it out")
    compared = [texts if cut is None else list(map(cut, texts)) for texts in (then.answers, after.references)]
    parts = {
        name: then.parts[name] if name in (ACCURACY, MARGIN) else answer_metrics.parts(metric, *compared)
        for name, metric in after.metrics.items()
    }
    return dataclasses.replace(after, loss_N2=then.parts[LOSS], answers=then.answers, parts=parts)


def _of_the_base(run):
    """Return {what decides how the base answers: a value that is equal for equal ones}."""
    there, recipe = run.environment(), run.recipe()
    base = there["base_model"]
    return {
        "base model": (base["sha256"], base.get("quantized_sha256"), base.get("kept_tensors")),
        "quantization": recipe.quantization,
        "device or dtype": (there["device"], there["compute_dtype"], recipe.model.dtype),
        "chat template": (recipe.data.chat_template, recipe.data.system_as_user),
        "versions": there["versions"],
    }
