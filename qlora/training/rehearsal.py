"""The largest micro-batch, forward and backward before the first step: out of memory comes at once, or not at all."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import torch

from ..runs.checkpoints import places
from .private_names import version


def rehearse(trainer, run):
    """Call run() as if the training were well under way, and undo all of it.

    What a first step lacks is there: the optimizer's state, and the sum of earlier micro-batches' gradients.
    """
    with held_later(trainer), undone(trainer):
        run()


def largest_micro_batch(lengths, rows, tokens=None):
    """Return the numbers of the longest rows: as many as a micro-batch has, or at most that and enough to fill `tokens`."""
    lengths = np.asarray(lengths)
    longest_first = np.argsort(-lengths, kind="stable")[:rows]
    if tokens is None:
        return longest_first
    return longest_first[: 1 + int(np.searchsorted(np.cumsum(lengths[longest_first]), tokens))]


@contextlib.contextmanager
def held_later(trainer):
    """Allocate what later micro-batches find in memory beside the model."""
    masters, optimizer = trainer.trained.masters.masters, trainer.own_optimizer
    held = [torch.empty_like(m) for m in masters] if trainer.accumulates else []
    if hasattr(optimizer, "init_state"):  # of bitsandbytes: what its first step begins with, paged where that is
        for master, group, place in places(optimizer):
            if not optimizer.state[master]:
                optimizer.init_state(group, master, *place)
    elif not optimizer.state:
        held += [torch.empty_like(m) for m in masters for _ in ("exp_avg", "exp_avg_sq")]
    yield
    held.clear()


@contextlib.contextmanager
def undone(trainer):
    """Restore random states, counters, gradients and buffers after the block."""
    training, undo = trainer.model.training, way_back(trainer)
    try:
        yield
    finally:
        undo()
        trainer.model.train(training)


def way_back(trainer):
    """Return a function that restores random states, counters and buffers as they are now, and drops the model's gradients."""
    model, counters, random_numbers = trainer.model, trainer.counters(), random_states(trainer.model)
    buffers = [(buffer, _copy(buffer, trainer.copies)) for buffer in model.buffers()]

    def undo():
        random_numbers()
        trainer.restore_counters(counters)
        for buffer, value in buffers:
            buffer.copy_(value)
        for parameter in model.parameters():
            parameter.grad = None

    return undo


def _copy(buffer, copies):
    """Return a copy of `buffer`, that of an earlier call where it has not changed since: hardly any buffer ever does.

    copies: {id: (buffer, its version, copy)}.
    """
    before = copies.get(id(buffer))
    if before is None or before[0] is not buffer or before[1] != version(buffer):
        copies[id(buffer)] = before = buffer, version(buffer), buffer.clone()
    return before[2]


@contextlib.contextmanager
def same_random_numbers(model):
    """Restore the state of every random generator after the block."""
    restore = random_states(model)
    try:
        yield
    finally:
        restore()


def random_states(model):
    """Return a function that restores the state of every random generator as it is now."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(model.device) if model.device.type == "cuda" else None

    def restore():
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, model.device)

    return restore
