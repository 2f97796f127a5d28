"""Reliability, as a part that any transformers Trainer can have: `class Mine(Reliable, transformers.Trainer)`.

float32 masters, loss scaling in float16, a rehearsal of the largest micro-batch, a micro-batch that does not fit run again
with less memory, steps skipped for a non-finite loss, a watch for divergence, checkpoints that are resumed to the bit,
stopping by a signal, a warmup that starts above 0, evaluations weighted by what their loss is a mean of, the peak of memory;
all told as events of runs/record.py.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .. import base_model, data
from ..runs import checkpoints
from ..runs.record import Begun, CheckpointBegun, Evaluation, Rehearsed, Rescaled, Skipped, Step
from ..system import memory
from ..system.errors import Interrupted, TrainingFailed
from ..system.events import emit
from . import rehearsal
from . import saving as saved
from .best import end_with_best
from .clock import Clock
from .divergence import Watch
from .evaluating import Evaluating
from .loss_scale import LossScale
from .optimizer import schedule_of, without_waits
from .order import ByLength
from .out_of_memory import Moment, few
from .private_names import set_rates
from .rehearsal import allocate_states, largest_micro_batch, rehearse, room_for_a_step
from .saving import Saves
from .trained_parameters import Trained


class Reliable(Evaluating):
    """The part. Stands before the Trainer class: a later `fit()` trains to the end.

    objective: an objectives.Objective. A batch may have "rows", the numbers of its rows from 0, for messages; the model does
    not see it. Other arguments are the Trainer's. The args' save_strategy must be "no" and logging_nan_inf_filter False.
    """

    optimizer: Any
    lr_scheduler: Any
    trained: Trained

    def __init__(self, model, objective, reliability, **arguments):
        self.objective, self.reliability, self.saving = objective, reliability, reliability.saving
        self.best, self.processes = reliability.best, reliability.processes
        given = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
        super().__init__(model=model, **arguments)
        for parameter, values in given.items():
            # trl casts the adapters of a quantized base to bf16, whatever it computes in
            parameter.data = values.to(parameter.device)
        in_float16 = any(values.dtype == torch.float16 for values in given.values())
        self.scaling = LossScale() if in_float16 else None
        self.advice = "Lower training.learning_rate"  # where a number is not finite
        if in_float16:
            self.advice = (
                f"Set {_dtype_field(model)}=float32, because float16 ends at 65,504, or lower training.learning_rate"
            )
        # of rows that are sorted by length, the first ones say nothing about the others
        first = {"first": math.inf} if reliability.group_by_length else {}
        self.watch = Watch(reliability.watchdog_steps, objective.watched_name, **first)
        self.saves = Saves(self.saving.every, self.watch)
        self.peak = memory.Peak()
        self.rehearsed_bytes, self.begun, self.economy = None, False, reliability.economy
        self.failure = None  # why training ends before its time
        self.moment = Moment("before the first step")
        self.micro_batches = []  # of the step at hand: (numbers of its rows, loss on the device)
        self.take_back = None  # undoes what the step at hand has counted and drawn; None: there is none
        self.changes_weights = False  # until the step is finished
        self.norm = None  # of the last step that was taken
        self.copies = {}  # of the model's buffers, as rehearsal.way_back keeps them
        self.evaluated = None  # of the evaluation at hand: the summed loss, and how many items it is of
        self.evaluation_due = False  # one after this step has been left
        self.held_out = self.saved_step = None  # [step, loss] of the last evaluation; the step of the last checkpoint
        self.resumed = state = self.saving.state()
        self.tokens, self.num_lines = (state["tokens"], state["lines"]) if state else (0, 0)
        self.clock = Clock(state["seconds"], state["outside_seconds"], state["tokens"]) if state else Clock()
        if state:
            self.watch.restore(state["watch"])
            self.norm = state["norm"]
            if state["fingerprint"] == self.saving.fingerprint:  # else the held-out rows may be others
                self.held_out = state.get("held_out")
            if self.best is not None:
                self.best.restore(state.get("best"))
            self.economy.restore(state.get("less_memory"))  # older checkpoints have none
            self._restore_scale(state.get("loss_scale"))
            self.objective.restore(state.get("objective"))
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        self.add_callback(_Moments(self))

    def fit(self):
        """Train to the end and evaluate; return (mean loss of the steps that were taken, held-out loss or None).

        Raises:
            Interrupted: saving.stop asked for it; a checkpoint has all that was done.
            TrainingFailed: a few losses or gradients are not finite, the loss has diverged, a weight is not finite, or an
                adapter does not move.
        """
        resume = self.saving.resume
        with self.peak:
            mean_loss = self.train(resume_from_checkpoint=resume and str(resume)).training_loss
            if self.failure is not None:
                self.refuse_left()
            steps, overflows = self.state.global_step, self.scaling.overflows if self.scaling else 0
            left_out = self.watch.not_taken + overflows
            if left_out == steps:  # in a run too short for `Watch` to end it, or for the loss scale to fall far enough
                self.refuse_left()
                raise TrainingFailed(
                    f"every step was skipped because of a non-finite loss or gradient{' (in float16)' * bool(overflows)}. "
                    f"{self.advice}, or look at the rows listed in {Path(self.args.output_dir) / 'metrics.jsonl'}"
                )
            saved.refuse_not_finite(self, self.trained.state()[0])
            eval_loss = self.last_evaluation() if self.eval_dataset is not None else None
            self.refuse_left()
            if self.best is not None:
                self.processes.wait()  # the first writes the checkpoint of the best
                ended = end_with_best(self)
                self.tell(ended)
                eval_loss = ended.eval_loss
        return mean_loss * steps / (steps - left_out), eval_loss  # transformers divides by all

    def num_tokens(self):
        """Return the tokens trained on so far, padding excluded."""
        return int(self.tokens)

    # ---- what a Trainer makes before it trains ----

    def train_sampler(self):
        """Return the order of the training rows, None for the Trainer's own."""
        if not self.reliability.group_by_length:
            return None
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(rows_per_step, self.reliability.lengths, self.args.seed)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            # not before `fit`, which is where memory that does not suffice for the masters is said
            self.trained = Trained(self.model, self.processes)
            make, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            make = without_waits(make)
            self.optimizer = make(self.trained.groups(self.args.learning_rate, self.args.weight_decay), **arguments)
            self.optimizer.register_step_post_hook(lambda *_: self._finish_step())
        return self.optimizer

    @property
    def accumulates(self):
        """Whether a step may have several micro-batches; of joined rows, in one process."""
        tokens, count = self.reliability.tokens, self.processes.count
        if tokens is None:
            return self.args.gradient_accumulation_steps > 1
        longest = np.sort(self.reliability.lengths)[::-1][: self.args.per_device_train_batch_size]
        return data.micro_batches_of(longest, tokens, count).max() >= count

    @property
    def own_optimizer(self):
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler = schedule_of(self.args, optimizer or self.optimizer, num_training_steps)
        return self.lr_scheduler

    def begin(self):
        """The last things before the first step: rehearse, say that the run begins, make up for an evaluation that was left."""
        self.processes.same_weights(self.trained.masters)
        self.trained.begin(self.state.max_steps)
        allocate_states(self)
        if self.reliability.rehearse and len(self.reliability.lengths):
            rows, tokens = self.args.per_device_train_batch_size, self.reliability.tokens
            self.rehearse(largest_micro_batch(self.reliability.lengths, rows, tokens))
        self.objective.begin(self)
        emit(Begun(self.state.global_step, self.state.max_steps, self.num_lines, self.objective.counts()))
        self.clock.begin()
        self.begun = True
        self.say_less_memory()
        if self.resumed is not None:
            self.restore_loss_sums(self.resumed["loss"])
            self.saved_step = self.state.global_step
            if self.resumed["evaluation_due"]:
                saved.make_up(self)

    def is_over(self):
        """Whether training has ended before a step of this process."""
        return self.best is not None and self.best.is_over

    def rehearse(self, largest):
        """Run the training rows of these numbers forward and backward, without a trace."""
        inputs = self.data_collator([self.train_dataset[int(index)] for index in largest])
        rows = inputs.pop("rows", ())
        if self.reliability.tokens is not None:
            inputs = self.objective.cut(inputs, self.reliability.tokens)
        self.moment = Moment("in the rehearsal, before the first step", inputs, rows)
        # what the loop sets before each step: a loss that is a mean of micro-batches is divided by it
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        step, num_items = super().training_step, self.objective.num_items(inputs)
        while True:
            self.peak.lap()
            rehearse(self, lambda: self.economy.run(self, lambda part: step(self.model_wrapped, part, num_items)))
            self.rehearsed_bytes = self.peak.lap()
            if not self.economy.keep_reserve(self, self.rehearsed_bytes):
                break
        emit(Rehearsed(self.rehearsed_bytes))

    # ---- a step ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = None if return_outputs else self.objective.loss(model, inputs, num_items_in_batch)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch) if loss is None else loss
        if self.scaling is not None and not return_outputs:
            self.scaling.apply(loss)
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run the micro-batches of a batch, most often one; return their summed loss, on the device."""
        losses, parts = [], self.objective.micro_batches(inputs, inputs.pop("rows", ()))
        if len(parts) > 1:  # by which trl divides a loss that is a mean of micro-batches: that of experts' balance
            self.current_gradient_accumulation_steps = len(parts)
        for part, rows in parts:
            if not self.micro_batches:
                self.loss_before = self.loss_since_logged()
                self.take_back = saved.way_back(self)
            when = f"in step {self.state.global_step + 1}, micro-batch {len(self.micro_batches) + 1}"
            self.moment = Moment(when, part, rows)
            # kept on the device: reading it here would make the GPU wait at every micro-batch
            self.tokens = self.tokens + self.objective.num_tokens(part)
            number = len(self.micro_batches)
            if self.processes.owns(number):
                with self.processes.random_numbers(self.model, self.args.seed, self.state.global_step, number):
                    losses.append(self.run_micro_batch(model, num_items_in_batch))
            else:  # another process computes it
                losses.append(torch.zeros((), device=self.args.device))
            self.micro_batches.append((rows, losses[-1]))
        return _sum(losses)

    def run_micro_batch(self, model, num_items):
        """Run that of `moment` forward and backward, and add its gradients to the masters'; return its share of the loss."""
        step = super().training_step
        reduced = self.accelerator.num_processes == 1 or self.accelerator.sync_gradients
        # a loss that is a mean of the micro-batch is not the sum of its halves'
        divisible = num_items is not None
        keep = self.trained.masters.take_gradients if reduced else None
        memory.give_back_holes(self.model.device)
        return _sum(self.economy.run(self, lambda part: step(model, part, num_items), keep, divisible))

    def finish_gradients(self):
        """Before the optimizer: clip the gradients, or skip the step; return their norm before, or of the last step taken."""
        step, masters, again = self.state.global_step + 1, self.trained.masters, super().training_step
        if self.processes.lacks_one_of(len(self.micro_batches)):
            rehearsal.keep_company(
                self, lambda batch: again(self.model_wrapped, batch, self.objective.num_items(batch))
            )
            masters.take_gradients()  # those of the others
        self.moment = Moment(f"in step {step}, when the weights were changed")
        room_for_a_step(self)
        self.processes.sum_gradients(masters)
        if self.scaling is not None:
            masters.multiply_gradients(1 / self.scaling.scale)
        self.trained.add_penalty()  # here: logged losses stay those of the objective
        norm = masters.clip_gradients(self.args.max_grad_norm)
        memory.give_back_holes(self.model.device)  # a large parameter is stepped in float32
        losses = [loss for _, loss in self.micro_batches]
        gradient, *losses = torch.stack([norm, *losses]).tolist()  # one wait for a GPU
        losses = self.processes.losses_of_all(self, losses)
        self.changes_weights = True
        if all(map(math.isfinite, [gradient, *losses])):
            self.failure = self.watch.take(step, self.objective.watched(sum(losses)))
            self.norm = gradient
            if self.scaling is not None:
                self.scaling.took()
        elif self.scaling is not None and all(map(math.isfinite, losses)) and self.scaling.fell():
            self._leave_out()
            self.tell(Rescaled(step, self.state.epoch, self.scaling.scale, self.clock.elapsed()))
        else:
            self._skip(step, gradient, losses)
        return self.norm

    def _restore_scale(self, then):
        """Go on from the LossScale.state of a checkpoint; None: of another dtype, or older. A run may change its dtype."""
        if then and self.scaling is not None:
            self.scaling.restore(then)
        elif then:
            self.watch.not_taken += then["overflows"]  # the mean loss is that of the other steps still

    def _leave_out(self):
        """Skip this step: the optimizer changes nothing, and the mean loss is that of the other steps."""
        self.trained.masters.clear_gradients()
        self.leave_out_loss(self.loss_before)

    def _skip(self, step, gradient, losses):
        """Skip this step, and say so: a loss is not finite, or a gradient, in float16 at the lowest scale."""
        self._leave_out()
        broken = [at for at, loss in enumerate(losses) if not math.isfinite(loss)]
        suspects = [rows for at, (rows, _) in enumerate(self.micro_batches) if at in broken or not broken]
        rows = [number + 1 for numbers in suspects for number in numbers]
        what = f"the loss is {losses[broken[0]]}" if broken else f"the gradient is {gradient}"
        if rows:
            what += f" with training row{'s' * (len(rows) > 1)} {few([f'{number:,}' for number in rows])}"
        failure = self.watch.leave_out(step, what)
        if self.scaling is not None and not broken:
            failure = f"{what} in step {step}, though the loss scale has fallen to its lowest, {self.scaling.scale:g}"
        self.failure = failure and f"{failure}. {self.advice}, or look at these rows: qlora data --row"
        self.tell(Skipped(step, self.state.epoch, what, tuple(rows), self.clock.elapsed()))

    def _finish_step(self):
        self.trained.finish_step(self.state.global_step + 1)
        self.micro_batches, self.take_back, self.changes_weights = [], None, False

    def end_step(self, control):
        """After a step: say whether to save, and whether to stop."""
        step, to = self.state.global_step, self.saving.to
        due = self.saves.now(step, step >= self.state.max_steps)
        if self.best is not None and step >= self.state.max_steps:
            control.should_evaluate = True  # before the last checkpoint, which is to know of it
        if self.failure is not None:
            self.evaluation_due = control.should_evaluate
            control.should_training_stop, control.should_evaluate, control.should_log = True, False, True
            control.should_save = to is not None and not self.watch.diverged
            if to is not None and self.watch.diverged:
                to.set_aside(self.watch.last_good_step())
        elif to is not None and self.saving.stop.number is not None:
            control.should_save = control.should_training_stop = True
        elif to is not None and due:
            control.should_save = True

    # ---- records ----

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        step, epoch, metrics = self.state.global_step, self.state.epoch, self.objective.metrics(logs)
        if "loss" in logs:
            tokens = self.num_tokens()
            values = (logs["loss"], logs["learning_rate"], logs["grad_norm"], tokens, self.clock.rate(tokens))
            scale = {} if self.scaling is None else {"loss_scale": self.scaling.scale}
            metrics = self.trained.metrics() | metrics | scale
            self.tell(Step(step, epoch, *values, self.peak.bytes, self.clock.elapsed(), metrics))
        elif "eval_loss" in logs:
            self.tell(Evaluation(step, epoch, logs["eval_loss"], self.clock.elapsed(), metrics))

    def say_less_memory(self):
        """Record what the economy has changed, as soon as there is a file for it."""
        while self.begun and self.economy.waiting:
            self.tell(self.economy.waiting.pop(0))

    def tell(self, line):
        """Emit a line of metrics.jsonl, and count it."""
        self.num_lines += 1
        emit(line)

    # ---- checkpoints ----

    def refuse_left(self):
        """Raise TrainingFailed or Interrupted if training ended early."""
        if self.failure is not None:
            raise TrainingFailed(self.failure)
        if self.saving.stop.number is not None and self.saved_step == self.state.global_step:
            raise Interrupted(self.saving.stop.number)

    def save(self):
        """Write a checkpoint of everything that later steps depend on; only between two steps."""
        with self.clock.outside():
            step = self.state.global_step
            tensors, state = saved.contents(self)
            saved.refuse_not_finite(self, tensors)
            emit(CheckpointBegun(step))
            library = dataclasses.asdict(dataclasses.replace(self.state, log_history=[], stateful_callbacks={}))
            written = self.saving.to.write(step, tensors, state, library, self.saving.limit)
            self.saved_step = step
            emit(written)

    def restore(self):
        """Continue from the checkpoint of `saving.resume`."""
        saved.restore(self, self.resumed)
        # by the schedule of this recipe: its length and its rate may have been changed on purpose
        set_rates(self.lr_scheduler, self.state.global_step, self.own_optimizer)

    def restore_random_numbers(self):
        checkpoints.restore_random_state(self.resumed["random"], self.model.device)


def _sum(losses):
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def _dtype_field(model):
    """Return the recipe's field that says what `model` computes in."""
    return base_model.field(base_model.quantized_modules(model) or None)


class _Moments(TrainerCallback):
    """Calls the trainer at the two moments for which it has no method."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_step(control)
