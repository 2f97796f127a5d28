"""What a base scores on rows that another run on the same base was evaluated on: it is not asked again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ...evaluation import answer_metrics
from ...evaluation.intervals import MARGIN
from ...evaluation.preferences import ACCURACY
from ...evaluation.scores import LOSS, Score
from ...runs.folder import RunDir
from ...system.errors import InputError
from ..comparing import compared_runs


def open_evaluated(path, run, name) -> RunDir:
    """Return the run in `path`, which has evaluated the base of `run`. name: of the score, see RunDir.score_files.

    Raises:
        InputError: it has another base, or was not evaluated; or its folder is damaged.
    """
    other = RunDir.open(path)
    now = compared_runs.of_the_base(run)
    for what, then in compared_runs.of_the_base(other).items():
        if then != now[what]:
            raise InputError(f"--before-of {path}: another {what} than that of {run.path}; leave it out")
    compared_runs.measured(other, name, "before")
    return other


def of_another_run(other: RunDir, after: Score, asked, name, cut=None) -> Score:
    """Return the Score of the base of a run, of what another on the same base has of it "before" its training.

    other: as open_evaluated returns it. after: the Score of the run. asked: what each row asks, as JSON. name: of the score, see
    RunDir.score_files. cut: what makes of an answer the part that is compared; None: all of it.

    Raises:
        InputError: it was evaluated on other rows, or without a metric that is asked for.
    """
    then = compared_runs.measured(other, name, "before")
    expected: Sequence[str | None] = after.references or [None] * len(asked)
    same = then.rows == list(zip(asked, expected, strict=True))
    if not same or not np.array_equal(then.parts[LOSS][:, 1], after.loss_N2[:, 1]):  # the same tokens, too
        raise InputError(f"--before-of {other.path}: was evaluated on other rows; leave it out")
    if missing := [name for name in after.metrics if name in (ACCURACY, MARGIN) and name not in then.parts]:
        raise InputError(f"--before-of {other.path}: was evaluated without {missing[0]}; leave it out")
    compared = [texts if cut is None else list(map(cut, texts)) for texts in (then.answers, after.references)]
    parts = {
        name: then.parts[name] if name in (ACCURACY, MARGIN) else answer_metrics.parts(metric, *compared)
        for name, metric in after.metrics.items()
    }
    return dataclasses.replace(after, loss_N2=then.parts[LOSS], answers=then.answers, parts=parts)
