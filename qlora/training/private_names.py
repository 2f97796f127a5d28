"""What the trainer takes of the private names of transformers, trl, accelerate and torch: all of it, each with its reason.

tests/training/test_private_names.py holds this against the installed versions, and pyproject.toml allows no other minor ones.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import transformers

# a mixin: what it overrides is there in any class that it is put before
_Trainer: Any = transformers.Trainer if TYPE_CHECKING else object

# of lists of tensors: on a GPU a launch or two where a loop has one a tensor; torch's own optimizers are made of them
copy_all, add_all = torch._foreach_copy_, torch._foreach_add_
multiply_all, norm_of_each = torch._foreach_mul_, torch._foreach_norm

TRL_COUNTERS = ("_metrics", "_total_train_tokens")  # what trl's trainers count where they compute a loss


class Hooks(_Trainer):
    """Private methods of transformers' Trainer, each handed to a method of `Reliable`; and its sums of losses. counted: names
    of attributes in which a class counts what it computes, beside trl's."""

    counted: tuple[str, ...] = ()

    # ---- overridden ----

    def _get_train_sampler(self, train_dataset=None):
        # public are only the strategies that it knows, and none has an order by the epoch's number
        sampler = self.train_sampler()
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def _clip_grad_norm(self, model):
        # the moment between the last micro-batch and the optimizer; it would clip the model's gradients, not the masters'
        return self.finish_gradients()

    def _save_checkpoint(self, model, trial):
        # it writes pickles, and is not whole or absent
        self.save()

    def _load_from_checkpoint(self, *args, **kwargs):
        # nothing yet: the weights come with the optimizer, in float32
        pass

    def _load_optimizer_and_scheduler(self, checkpoint):
        # the moment when both are made and no step was taken
        if checkpoint is not None:
            self.restore()

    def _load_rng_state(self, checkpoint):
        # after the rows of earlier steps were skipped, which draws numbers
        if checkpoint is not None:
            self.restore_random_numbers()

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args):
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        # transformers 5.23 would take one more step where the last one was not an epoch's last
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begin

    def _run_epoch(self, *args, **kwargs):
        # where nothing is left to do: the loop would take a step before it looks
        if self.is_over():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # ---- read and written ----

    def loss_sums(self):
        """Return [of the steps that were logged, of those since, the step logged last] as JSON takes them."""
        return [self._total_loss_scalar, self._tr_loss.item(), self._globalstep_last_logged]

    def restore_loss_sums(self, sums):
        """Set what `loss_sums` returned; transformers begins at 0 when training goes on."""
        self._total_loss_scalar, since, self._globalstep_last_logged = sums
        self._tr_loss = torch.tensor(since, device=self.args.device)
        self._initial_global_step = 0

    def loss_since_logged(self):
        """Return the sum of the losses since the last log, on the device; a copy."""
        return self._tr_loss.clone()

    def forget_loss(self, before):
        """Take this step's losses back. before: `loss_since_logged` before its first micro-batch."""
        self._tr_loss.copy_(before)

    def add_losses(self, before, losses):
        """Set the sum of the losses since the last log to `before` and those of this step, in order."""
        for loss in losses:
            before = before + loss
        self.forget_loss(before)

    def leave_out_loss(self, before):
        """Take this step's losses out of the logged mean."""
        self.forget_loss(before)
        self._globalstep_last_logged += 1  # transformers divides by the steps since then

    def counters(self):
        """Return {name: copy} of the counters that the class has."""
        names = (*TRL_COUNTERS, *self.counted)
        return {name: copy.deepcopy(getattr(self, name)) for name in names if hasattr(self, name)}

    def restore_counters(self, counters):
        for name, value in counters.items():
            setattr(self, name, value)


def on_one_device(arguments):
    """Return TrainingArguments of one process that trains on one device, however many GPUs are in sight.

    With several, the Trainer would multiply the batch by their number and wrap the model in DataParallel.
    """
    assert arguments.device is not None  # reading it is what counts them
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def version(tensor):
    """Return a number that torch raises with every change in place: to see one without a question to the device."""
    return tensor._version


def set_rates(schedule, step, optimizer):
    """Set the learning rates of a torch LambdaLR for step `step`, counted from 0: without taking the steps until there."""
    schedule.last_epoch = step
    schedule._last_lr = [base * rate(step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
