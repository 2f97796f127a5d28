"""The largest micro-batch, forward and backward before the first step: out of memory comes at once, or not at all."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import torch

from ..runs.checkpoints import places, restore_optimizer
from ..system import memory, signals
from ..system.events import note
from .private_names import version


def rehearse(trainer, run):
    """Call run() as if the training were well under way, and undo all of it. On a CPU that may take minutes: it is said, and a
    signal ends it at once, where no other process waits for this one.

    What a first step lacks is there: the sum of earlier micro-batches' gradients.
    """
    note("rehearsal the largest micro-batch, before the first step")
    alone = trainer.processes.count == 1
    with signals.raised() if alone else contextlib.nullcontext(), held_later(trainer), undone(trainer):
        run()


def keep_company(trainer, run):
    """Call run(the batch at hand) without a trace: other processes run one of theirs, and gather the weights for it."""
    with undone(trainer):
        run(dict(trainer.moment.inputs))


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
    # filled: on a CPU memory that nobody has written to is not held yet
    held = [torch.full_like(m, 0.0) for m in trainer.trained.masters.masters] if trainer.accumulates else []
    yield
    held.clear()


@torch.no_grad()
def allocate_states(trainer):
    """Give the optimizer the states that it would make in its first step, to the bit: there memory cannot run out then."""
    optimizer = trainer.own_optimizer
    if hasattr(optimizer, "init_state"):  # of bitsandbytes, paged where that is
        for master, group, place in places(optimizer):
            if not optimizer.state[master]:
                optimizer.init_state(group, master, *place)
    elif not optimizer.state:
        named = zip(trainer.trained.names, places(optimizer), strict=True)
        zeros = {f"{name}/step": torch.zeros(()) for name in trainer.trained.names}
        for name, (master, *_) in named:
            zeros |= {f"{name}/{key}": torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
        restore_optimizer(optimizer, trainer.trained.names, zeros, {})


def room_for_a_step(trainer):
    """Allocate and free what the optimizer needs for itself in a step, while the step can still be left.

    Raises:
        RuntimeError: out of memory, though all was freed that can be.
    """
    optimizer = trainer.own_optimizer
    if trainer.model.device.type != "cuda" or hasattr(optimizer, "init_state") or optimizer.defaults.get("fused"):
        return  # a tensor at a time, less than a micro-batch takes; or nothing
    masters = trainer.trained.masters.masters
    try:
        [torch.empty_like(master) for master in masters]
    except RuntimeError as error:
        if not memory.is_refusal(error):
            raise
        memory.release(error)
    else:
        return
    memory.free_cached()
    [torch.empty_like(master) for master in masters]


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
