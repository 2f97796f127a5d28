"""bitsandbytes' optimizers without a wait for the GPU at each parameter; the schedule of the learning rate."""

from __future__ import annotations

import functools

import torch
from transformers import get_scheduler

from .private_names import set_rates


@functools.cache
def without_waits(cls):
    """Return a subclass of an optimizer of bitsandbytes whose `step` queues all updates and does not wait for them; another
    class as it is.

    bitsandbytes 0.50 synchronizes the device after each parameter: 449 times a step on a 7B. Nothing needs it. Prefetches,
    updates and what comes after them are queued on one stream, so each sees what the one before wrote, paged states too. The
    host alone is not in that order: it reads paged states for a checkpoint, and saving.contents synchronizes before that. A
    new paged buffer is filled with a wait of its own.
    """
    from bitsandbytes.optim.optimizer import Optimizer8bit

    if not (isinstance(cls, type) and issubclass(cls, Optimizer8bit)):
        return cls

    class WithoutWaits(cls):  # type: ignore[valid-type, misc]
        @torch.no_grad()
        def step(self, closure=None):
            """Take a step with the gradients that are there; a closure is not supported."""
            assert closure is None
            if not self.initialized:  # type: ignore[has-type]
                self.check_overrides()
                self.to_gpu()
                self.initialized = True
            for at, group in enumerate(self.param_groups):
                for number, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.init_state(group, parameter, at, number)
                    self.prefetch_state(parameter)
                    self.update_step(group, parameter, at, number)

    WithoutWaits.__name__ = WithoutWaits.__qualname__ = cls.__name__
    return WithoutWaits


def schedule_of(args, optimizer, num_steps):
    """Return the learning rate schedule of transformers, except that the warmup is never the whole run and starts above 0."""
    kind = args.lr_scheduler_type
    warmup = 0 if kind == "constant" else min(args.get_warmup_steps(num_steps), num_steps - 1)
    schedule = get_scheduler(kind, optimizer, warmup, num_steps)
    schedule.lr_lambdas = [_from_above_zero(rate, warmup) for rate in schedule.lr_lambdas]
    set_rates(schedule, 0, optimizer)
    return schedule


def _from_above_zero(rate, warmup):
    """Return the schedule `rate`, step -> share of the full rate, with `warmup` equal steps up to 1."""
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else rate(step)
