"""The evaluations of a reliable trainer: weighted by what their loss is a mean of, left where training is to stop, shared by
processes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..runs import record
from ..system.events import progress
from . import rehearsal
from .out_of_memory import Moment
from .private_names import Hooks
from .rehearsal import same_random_numbers
from .samples import answered


class Evaluating(Hooks):
    """The part of `reliable_trainer.Reliable` that evaluates; all that it reads and sets of a trainer is made there."""

    failure: Any
    held_out: Any

    def evaluate(self, *args, **kwargs):
        """Return the Trainer's metrics; {} where the evaluation was left, because training is to stop."""
        try:
            # the same random numbers: a run that goes on from before an evaluation is the same run
            with self.clock.outside(), same_random_numbers(self.model):
                samples = answered(self.reliability.samples, self.model, self._go_on)
                metrics = super().evaluate(*args, **kwargs)
        except _Left:
            if self.is_in_train:
                self.evaluation_due, self.control.should_evaluate = True, False
                self.control.should_save, self.control.should_training_stop = self.saving.to is not None, True
            return {}
        self.held_out = [self.state.global_step, metrics["eval_loss"]]
        if samples:
            self.tell(record.Samples(self.state.global_step, self.state.epoch, samples, self.clock.elapsed()))
        if self.best is not None and (self.best.take(self.state.global_step, metrics) or self.best.is_over):
            self.control.should_save = self.saving.to is not None
            self.control.should_training_stop |= self.best.is_over
        return metrics

    def _go_on(self):
        if self.saving.stop.number is not None:
            raise _Left

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        # transformers takes the mean of the batches' means, whatever is in them; this is the mean over all items
        self.evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with progress("evaluating", len(dataloader), "batches") as self.advance_evaluation:
            self.shares = self.processes.shares(self.saving.stop)
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.processes.lacks_one_of(len(dataloader)):
            rehearsal.keep_company(
                self, functools.partial(super().prediction_step, self.model, prediction_loss_only=True)
            )
        total, count = self.saving.stop.agree(self.evaluated.tolist())
        self.failure = self.processes.first_said(self.failure)
        if self.failure is not None:
            raise _Left
        output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        is_mine = next(self.shares)
        self._go_on()
        when = f"in the evaluation after step {self.state.global_step}"
        self.moment = Moment(when, inputs, inputs.pop("rows", ()), evaluates=True)
        predict = super().prediction_step
        if not is_mine:
            self.advance_evaluation(1)
            return torch.zeros((), device=self.args.device), None, None

        def score(part):
            found = predict(model, part, prediction_loss_only, ignore_keys)
            if not torch.isfinite(found[0]):
                self.failure = f"the loss is {found[0].item()} {when}, with {self.moment.batch(self.objective)}"
                if self.scaling is not None:
                    self.failure += f". {self.advice}"
                if self.processes.count == 1:
                    raise _Left
            count = self.objective.num_items(part).to(found[0].device)
            self.evaluated += torch.stack([found[0].double() * count, count.double()])
            return found

        scored = self.economy.run(self, score, divisible=prediction_loss_only)
        self.advance_evaluation(1)
        return scored[0]  # of halves the first: its loss is not used, `evaluated` has them all

    def last_evaluation(self):
        """Return the held-out loss after training; raises as `refuse_left` does, after a checkpoint, where it is left."""
        if self.held_out is not None and self.held_out[0] == self.state.global_step:
            return self.held_out[1]
        metrics = self.evaluate() if self.saving.stop.number is None else {}
        if metrics:
            return metrics["eval_loss"]
        if self.saved_step != self.state.global_step and self.saving.to is not None:
            self.save()
        return self.refuse_left()


class _Left(Exception):
    """Aborts an evaluation, because training is to stop."""
