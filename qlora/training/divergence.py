"""Watches a training: skipped steps (non-finite loss or gradient), and a loss that has diverged."""

from __future__ import annotations

import math
import statistics
from collections import deque

# the run ends after so many skipped steps: consecutive; in all, if they are more than this share of all steps
FEW_IN_A_ROW, FEW, SHARE = 3, 10, 0.01
RISE = 1.0  # nats: a perplexity 2.7 times as high
_FIRST = 10  # steps before the first median
_NOISE = 4  # standard errors: noise alone does not move the mean further
_WORST = 12.0  # nats: the loss of a uniform guess; larger losses count as this


class Watch:
    """Judges a run by the loss and the gradient of each of its steps.

    num_steps: the window. The loss has diverged when the median over the window is RISE above its lowest value so far and
    the mean is above its lowest value by more than noise. The median ignores single bad steps and a few hard rows; the
    mean ignores jumps of the median between easy and hard rows. None: only non-finite losses end the run.
    what: whose loss it is, in words. first: steps before the first median and mean.
    """

    def __init__(self, num_steps, what="the loss", first=_FIRST):
        self.num_steps, self.what, self.first = num_steps, what, first
        self.recent: deque = deque(maxlen=num_steps)  # (step, loss)
        self.lowest = [math.inf, math.inf]  # median; mean, with what chance may add to it
        self.lowest_step = 0  # of the median
        self.not_taken = self.in_a_row = self.here = 0  # in the whole run, without a break, in this process
        self.taken_here = 0
        self.diverged = False

    def take(self, step, loss):
        """Record the loss of a step, None where there is nothing to judge; return why the run has to end, or None."""
        self.in_a_row, self.taken_here = 0, self.taken_here + 1
        if self.num_steps is None or loss is None:
            return None
        self.recent.append((step, loss))
        if len(self.recent) < min(self.first, self.num_steps):
            return None
        losses = [min(loss, _WORST) for _, loss in self.recent]
        median, mean = statistics.median(loss for _, loss in self.recent), statistics.fmean(losses)
        chance = _NOISE * math.sqrt(sum((loss - mean) ** 2 for loss in losses)) / len(losses)
        if median < self.lowest[0]:
            self.lowest_step = step
        self.lowest = [min(median, self.lowest[0]), min(mean + chance, self.lowest[1])]
        risen = median > self.lowest[0] + RISE and mean - chance > self.lowest[1]
        if len(self.recent) < self.num_steps or not risen:
            return None
        self.diverged = True
        return (
            f"{self.what} has diverged: the median of the last {self.num_steps} steps is {median:.2f} in step {step}, it was "
            f"{self.lowest[0]:.2f} in step {self.lowest_step}. Lower training.learning_rate, or, if such losses are "
            "expected, set training.watchdog_steps=null"
        )

    def leave_out(self, step, what):
        """Record that a step was skipped because of `what`; return why the run has to end, or None."""
        self.not_taken, self.in_a_row, self.here = self.not_taken + 1, self.in_a_row + 1, self.here + 1
        many = self.here >= FEW and self.here > SHARE * (self.here + self.taken_here)
        if self.in_a_row < FEW_IN_A_ROW and not many:
            return None
        steps = f"{self.in_a_row} consecutive" if self.in_a_row >= FEW_IN_A_ROW else f"{self.here}"
        return f"{what} in step {step}; skipped: {steps} steps had a non-finite loss or gradient"

    def suspects(self):
        """True while so many of the last losses are high that the run may be diverging."""
        return self.num_steps is not None and sum(map(self._is_high, self.recent)) > self.num_steps / 4

    def last_good_step(self):
        """Return the last step before the losses rose: from there on, three in four are high. Errs on the early side."""
        high, good = 0, self.recent[0][0] - 1  # if no tail of the window qualifies: before all of it
        for count, (step, loss) in enumerate(reversed(self.recent), start=1):
            high += self._is_high((step, loss))
            good = step - 1 if 4 * high >= 3 * count else good
        return good

    def _is_high(self, entry):
        return entry[1] > self.lowest[0] + RISE

    def state(self):
        """Return what `restore` takes, as JSON."""
        lowest = [level if math.isfinite(level) else None for level in self.lowest]
        return {"recent": [*self.recent], "lowest": [lowest, self.lowest_step], "not_taken": self.not_taken}

    def restore(self, state):
        """Continue from `state`. Steps skipped by an earlier process do not count towards ending this one."""
        self.recent.extend(map(tuple, state["recent"]) if self.num_steps is not None else ())
        lowest, self.lowest_step = state["lowest"]
        self.lowest = [math.inf if level is None else level for level in lowest]
        self.not_taken = state["not_taken"]
