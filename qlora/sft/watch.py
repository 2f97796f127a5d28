"""What the numbers of a run say about it: steps that cannot be taken, and a loss that has risen for good."""

from __future__ import annotations

import math
import statistics
from collections import deque

FEW_IN_A_ROW, FEW, SHARE = 3, 10, 0.01  # steps that are not taken, before the run ends: in a row; in all, and of all
RISE = 1.0  # nats: a perplexity 2.7 times as high
_FIRST = 10  # steps whose median is taken for the first one
_NOISE = 4  # standard errors on either side: losses that only differ do not move a mean so far
_WORST = 12.0  # nats: what all tokens having one chance costs; how far a loss is above it says nothing


class Watch:
    """Judges a run by the loss and the gradient of each of its steps.

    num_steps: the loss has diverged when the median of the last so many steps is RISE above the lowest that it has been,
    and their mean above its lowest too, beyond chance. A single step, or a few rows that are hard, do not move a median;
    rows of two kinds, easy and hard, move it by chance, and not the mean. None: any loss will do that is a number.
    first: steps before the first median and mean.
    """

    def __init__(self, num_steps, first=_FIRST):
        self.num_steps, self.first = num_steps, first
        self.recent: deque = deque(maxlen=num_steps)  # (step, loss)
        self.lowest = [math.inf, math.inf]  # median; mean, with what chance may add to it
        self.lowest_step = 0  # of the median
        self.not_taken = self.in_a_row = self.here = 0  # in the whole run, without a break, in this process
        self.taken_here = 0
        self.diverged = False

    def take(self, step, loss):
        """Note a step that was taken; returns what is wrong with the run, or None."""
        self.in_a_row, self.taken_here = 0, self.taken_here + 1
        if self.num_steps is None:
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
            f"the loss has diverged: the median of the last {self.num_steps} steps is {median:.2f} in step {step}, it was "
            f"{self.lowest[0]:.2f} in step {self.lowest_step}. Lower training.learning_rate, or, if such losses are right, set "
            "training.watchdog_steps=null"
        )

    def leave_out(self, step, what):
        """Note a step that was not taken because of `what`; returns what is wrong with the run, or None."""
        self.not_taken, self.in_a_row, self.here = self.not_taken + 1, self.in_a_row + 1, self.here + 1
        many = self.here >= FEW and self.here > SHARE * (self.here + self.taken_here)
        if self.in_a_row < FEW_IN_A_ROW and not many:
            return None
        often = f"{self.in_a_row} in a row" if self.in_a_row >= FEW_IN_A_ROW else f"{self.here} of them"
        return f"{what} in step {step}; it was not taken, nor were others before, {often}"

    def suspects(self):
        """True while so many of the last losses are high that the weights may be those of a run that diverges."""
        return self.num_steps is not None and sum(map(self._is_high, self.recent)) > self.num_steps / 4

    def last_good_step(self):
        """Return the step since which three in four losses are high, or one a little before: any noise is taken for a rise."""
        high, good = 0, self.recent[0][0] - 1  # where no part of them is: all of them
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
        """Go on from a `state`. Steps that were not taken by another process do not end this one."""
        self.recent.extend(map(tuple, state["recent"]) if self.num_steps is not None else ())
        lowest, self.lowest_step = state["lowest"]
        self.lowest = [math.inf if level is None else level for level in lowest]
        self.not_taken = state["not_taken"]
