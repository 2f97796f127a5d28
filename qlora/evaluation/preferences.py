"""Whether a model prefers the chosen answers of pairs: the share for which it thinks them likelier, and by how much.

Log probabilities are sums over an answer's tokens, as in the loss of DPO, so that a longer answer is less likely: what a training
did is the change from before.

# N pairs
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ..data import Answers
from . import intervals, metrics
from .intervals import MARGIN
from .scores import Score

ACCURACY = "preference_accuracy"
METRICS = (ACCURACY, MARGIN)


def nats_of(model, rows) -> np.ndarray:
    """Return (N, 2): nats and trained tokens of each answer."""
    return np.array(metrics.losses(model, rows))


def margin_of(now, before=None) -> dict:
    """Return {"value", "low", "high"} of by how much likelier good answers are than bad ones, in nats a token; of what has
    changed since `before`. Both: nats and tokens of the good answers (G, 2) and of the bad ones (M, 2), the
    same rows."""

    def margin(good, bad):
        return intervals.ratio(bad) - intervals.ratio(good)

    def rise(good, bad):
        return margin(good[:2], bad[:2]) - margin(good[2:], bad[2:])

    if before is None:
        return intervals.with_interval(margin(*map(intervals.summed, now)), *intervals.of_two_kinds(margin, *now))
    both = [np.concatenate([one, then], axis=1) for one, then in zip(now, before, strict=True)]
    return intervals.with_interval(rise(*map(intervals.summed, both)), *intervals.of_two_kinds(rise, *both))


class _Mean:
    """A mean over rows of what a model says of them, whatever its answer."""

    value = staticmethod(intervals.ratio)

    def row(self, answer, reference):
        raise NotImplementedError("is of log probabilities, not of an answer")


def with_preferences(score: Score, model, pairs) -> Score:
    """Return the Score of a model on the chosen answers of `pairs`, data.Rows, with what it prefers: preference_accuracy, and
    preference_margin, in nats an answer."""
    rejected_N = np.array(metrics.losses(model, Answers(pairs, 1)))[:, 0]
    margin_N = rejected_N - score.loss_N2[:, 0]  # nats: the less, the likelier
    ones = np.ones(len(margin_N))
    parts = {ACCURACY: np.stack([(margin_N > 0).astype(float), ones], 1), MARGIN: np.stack([margin_N, ones], 1)}
    return dataclasses.replace(
        score, metrics={**dict.fromkeys(parts, _Mean()), **score.metrics}, parts={**parts, **score.parts}
    )
