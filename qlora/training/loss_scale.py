"""Dynamic loss scaling: gradients of a model in float16 are multiplied, so that small ones do not become 0 on their way.

The policy and its numbers are those of torch.amp.GradScaler, which is not used itself: its step() reads from the device whether
a gradient overflowed (a wait for the GPU beside the trainer's own), cannot tell a non-finite loss from an overflow, and lets
the scale fall without end.
"""

from __future__ import annotations

INITIAL, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000
LOWEST, HIGHEST = 1.0, 2.0**24  # at 1 the gradients are what they are; GradScaler has neither bound


class LossScale:
    """A power of two, so that scaling and its undoing round nothing in float32. overflows: steps that were left out for it.

    good: steps that were taken since the scale has changed.
    """

    def __init__(self):
        self.scale, self.good, self.overflows = INITIAL, 0, 0

    def apply(self, loss):
        """Have the backward pass of `loss` begin with the scale; the loss itself stays what it is."""
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * self.scale)

    def took(self):
        """Record a step whose gradients were finite."""
        self.good += 1
        if self.good == INTERVAL:
            self.scale, self.good = min(self.scale * GROWTH, HIGHEST), 0

    def fell(self):
        """Lower the scale after a step whose gradients were not finite; return False where it is at its lowest."""
        if self.scale <= LOWEST:
            return False
        self.scale, self.good, self.overflows = max(self.scale * BACKOFF, LOWEST), 0, self.overflows + 1
        return True

    def state(self):
        """Return what `restore` takes, as JSON."""
        return vars(self).copy()

    def restore(self, state):
        self.scale, self.good, self.overflows = state["scale"], state["good"], state["overflows"]
