"""What a checkpoint holds: everything that later steps depend on, and the way back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..runs import checkpoints
from ..system import memory
from ..system.errors import TrainingFailed
from ..system.signals import Stop
from .rehearsal import random_states, same_random_numbers
from .trained_parameters import not_finite


@dataclass(frozen=True)
class Saving:
    """Where checkpoints go and come from.

    to: None for nowhere. every: steps; None for only when training ends early. limit: how many are kept; None for all.
    fingerprint: is kept in each, as JSON. resume: the folder of the one to continue from, which has verified. stop: has a
    number once training is to save and stop.
    """

    to: checkpoints.Checkpoints | None = None
    every: int | None = None
    limit: int | None = None
    fingerprint: Any = None
    resume: Path | None = None
    stop: Stop = dataclasses.field(default_factory=Stop)

    def state(self):
        """Return state.json of the checkpoint to continue from, None if there is none."""
        return None if self.resume is None else checkpoints.read_state(self.resume)


def contents(trainer):
    """Return ({name: tensor}, state) of a Reliable trainer between two steps; state: for state.json. Of masters that several
    processes share, all are those of the first, and others have their own."""
    settled(trainer.model.device)  # paged states are read from the host
    tensors, of_method = trainer.trained.state()
    optimizer, numbers = checkpoints.optimizer_state(trainer.own_optimizer, trainer.trained.names)
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
    if trainer.processes.sharded:
        tensors, numbers = trainer.trained.masters.collected(tensors, numbers)
    return tensors, {
        "fingerprint": trainer.saving.fingerprint,
        "optimizer": numbers,
        **of_method,
        "random": checkpoints.random_state(trainer.model.device),
        "loss": trainer.loss_sums(),
        "tokens": trainer.num_tokens(),
        "evaluation_due": trainer.evaluation_due,
        "held_out": trainer.held_out,
        "watch": trainer.watch.state(),
        "best": trainer.best and trainer.best.state(),
        "less_memory": trainer.economy.state(),
        "loss_scale": trainer.scaling and trainer.scaling.state(),
        "objective": trainer.objective.state(),
        "norm": trainer.norm,
        "step": trainer.state.global_step,
        "lines": trainer.num_lines,
        "seconds": trainer.clock.elapsed(),
        "outside_seconds": trainer.clock.outside_seconds,
    }


def restore(trainer, state):
    """Give a trainer that has taken no step the tensors of its checkpoint, whose state.json says `state`.

    Raises:
        InputError: the weights or the optimizer's states are others, or of other shapes.
    """
    tensors, numbers = checkpoints.read_tensors(trainer.saving.resume), state["optimizer"]
    trained, optimizer = trainer.trained, checkpoints.under("optimizer", tensors)
    mine = set(trained.names)
    optimizer = {name: tensor for name, tensor in optimizer.items() if name.rpartition("/")[0] in mine}
    with torch.no_grad():
        trained.restore(tensors, state)
        # paged states are written from the host: what the device still does to them, such as filling them with zeros, comes first
        checkpoints.restore_optimizer(
            trainer.own_optimizer, trained.names, optimizer, numbers, lambda: settled(trainer.model.device)
        )
        settled(trainer.model.device)


def way_back(trainer):
    """Return a function that makes counters and random numbers those of now: before a step's first micro-batch."""
    tokens, counters, random_numbers = trainer.tokens, trainer.counters(), random_states(trainer.model)

    def take_back():
        trainer.tokens = tokens
        trainer.restore_counters(counters)
        trainer.forget_loss(trainer.loss_before)
        random_numbers()

    return take_back


def save_unfinished(trainer):
    """Memory ran out: write a checkpoint of the last step that was taken, unless the next has begun to change the weights.

    The run that goes on from it has what less memory was tried last. Where there is none to write it, earlier ones are intact; so
    it is where the others have some of the masters, and wait for the micro-batch that did not fit.
    """
    is_saved = trainer.saved_step == trainer.state.global_step
    if (
        is_saved
        or trainer.processes.sharded
        or not trainer.begun
        or trainer.saving.to is None
        or trainer.changes_weights
    ):
        return
    if trainer.moment.evaluates:
        trainer.evaluation_due = trainer.is_in_train
    elif trainer.take_back is not None:
        trainer.take_back()
    try:
        trainer.save()
    except memory.MAY_BE_REFUSALS as error:
        if not memory.is_refusal(error):
            raise


def make_up(trainer):
    """Make the evaluation that was left when the checkpoint was written, and the checkpoint that is due after it."""
    if not trainer.evaluate():
        trainer.refuse_left()  # the checkpoint still says so
    elif trainer.control.should_save:
        with same_random_numbers(trainer.model):
            trainer.restore_random_numbers()  # which transformers does later
            trainer.save()


def refuse_not_finite(trainer, tensors):
    """Raise TrainingFailed, before anything is saved, if a number of {name: tensor} is not finite, here or in another process."""
    broken = not_finite(tensors)
    with trainer.processes.failing_together():
        if broken:
            why = f"\n  {trainer.failure}" if trainer.failure is not None else ""
            raise TrainingFailed(
                f"{broken[0]} contains non-finite values after step {trainer.state.global_step}; it was not saved. "
                f"Earlier checkpoints are intact: lower training.learning_rate{why}"
            )


def settled(device):
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Saves:
    """Says after which steps to save. every: steps; watch: no checkpoint may be made while the run may be diverging."""

    def __init__(self, every, watch):
        self.every, self.watch = every, watch
        self._due = None  # the step since which a checkpoint is put off

    def now(self, step, is_last):
        """True if a checkpoint is to be written after `step`; is asked once after each."""
        if self.every is None:
            return False
        if self._due is None and step % self.every == 0:
            self._due = step
        if not is_last and (self._due is None or self._put_off(step)):
            return False
        self._due = None
        return True

    def _put_off(self, step):
        """After so many steps the run would have diverged: its losses are just uneven."""
        return self.watch.suspects() and step - self._due < self.watch.num_steps
