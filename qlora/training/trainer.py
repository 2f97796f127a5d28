"""The trainer: trl's, with master weights, a lean loss, rehearsal and checkpoints."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import TrainerCallback, get_scheduler
from trl import SFTTrainer

from .. import methods
from ..data import IGNORE_INDEX
from ..kernels import loss
from ..runs import checkpoints
from ..runs.checkpoints import under
from ..runs.record import Begun, CheckpointBegun, Evaluation, Rehearsed, Skipped, Step
from ..system.errors import Interrupted, TrainingFailed
from ..system.events import emit
from ..system.signals import Stop
from .masters import MasterWeights
from .rows import ByLength
from .shortage import Moment, few


@dataclass(frozen=True)
class Saving:
    """Where checkpoints go and come from.

    to: a checkpoints.Checkpoints, None for nowhere. fingerprint: is kept in each. resume: the folder of the one to
    continue from, which has verified. stop: has a number once training is to save and stop.
    """

    to: Any = None
    fingerprint: Any = None
    resume: Any = None
    stop: Stop = dataclasses.field(default_factory=Stop)


class Trainer(SFTTrainer):
    """trl's SFTTrainer with float32 master weights and gradients, a lean loss on the CPU, and eval losses weighted by tokens."""

    lean_loss = False
    lengths: Any = None  # of the training rows, where rows of like length are to share a batch
    rehearsed_bytes: Any = None
    peak: Any = None  # a memory.Peak
    moment = Moment("before the first step")
    failure: Any = None  # why training ends before its time
    saving = Saving()
    save_total_limit = None
    resumed: Any = None  # state.json of the checkpoint that training continues from
    saved_step = None
    evaluation_due = False  # one after this step has been left
    clock: Any
    num_lines = 0  # of metrics.jsonl
    optimizer: Any
    norm: Any = None  # of the last step that was taken
    begun: bool = False
    lr_scheduler: Any
    evaluated: Any = None  # of the evaluation at hand: the summed loss, and the tokens it is of

    def __init__(self, model, watch, **arguments):
        self.watch = watch
        self.micro_batches: list = []  # of the step at hand: (numbers of its rows, loss on the device)
        self.trainable = methods.trainable(model)
        self.before: Any = {name: p.detach().clone() for name, p in self.trainable.first_to_move.items()}
        super().__init__(model, **arguments)
        # compute_loss divides by the tokens of the whole step itself, whatever the model's forward takes: else the mean
        # would be one of micro-batches, divided by a count that only exists once training has begun
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset=None):
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(rows_per_step, self.lengths, self.args.seed)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            make, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            parameters, self.trained = dict(self.model.named_parameters()), self.trainable.names
            held = [self.trainable.held.get(name) for name in self.trained]
            self.masters = MasterWeights([parameters[name] for name in self.trained], held)
            groups = self.trainable.optimizer_groups(self._weights(), self.args.learning_rate, self.args.weight_decay)
            self.optimizer = make(groups, **arguments)
            self.optimizer.register_step_post_hook(lambda *_: self._finish_step())
        return self.optimizer

    def _finish_step(self):
        """After the optimizer: the model gets the new weights; all have moved in the first step that was taken."""
        self.masters.give_weights()
        taken = any(master.grad is not None for master in self.masters.masters)
        if self.before is not None and taken:
            methods.refuse_unmoved(self.model, self.before)
            self.before = None
        if self.trainable.schedule.changes:
            with self.masters.in_the_model():
                self.trainable.schedule.after_step(self.state.global_step + 1)
            self.masters.give_weights()
        self.masters.clear_gradients()
        self.micro_batches = []

    def rehearse(self, largest):
        """Run the rows `largest` of the training data forward and backward as if the run were well under way; undo it all.

        What a first step lacks is there: the optimizer's state, and the sum of earlier micro-batches' gradients.
        """
        inputs = self.data_collator([self.train_dataset[int(index)] for index in largest])
        rows = inputs.pop("rows")
        self.moment = Moment("in the rehearsal, before the first step", inputs, rows)
        with self._held_later(), _undone(self):
            super().training_step(self.model_wrapped, dict(inputs), (inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        self.rehearsed_bytes = self.peak.bytes
        emit(Rehearsed(self.rehearsed_bytes))

    @contextlib.contextmanager
    def _held_later(self):
        """Allocate what later micro-batches find in memory beside the model."""
        masters = self.masters.masters
        optimizer = self._own_optimizer()
        held = [torch.empty_like(m) for m in masters] if self.args.gradient_accumulation_steps > 1 else []
        if hasattr(optimizer, "init_state"):  # of bitsandbytes: what its first step begins with, paged where that is
            for master, group, place in checkpoints.places(optimizer):
                if not optimizer.state[master]:
                    optimizer.init_state(group, master, *place)
        elif not optimizer.state:
            held += [torch.empty_like(m) for m in masters for _ in ("exp_avg", "exp_avg_sq")]
        yield
        held.clear()

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self.micro_batches:
            self.loss_before = self._tr_loss.clone()
        when = f"in step {self.state.global_step + 1}, micro-batch {len(self.micro_batches) + 1}"
        self.moment = Moment(when, inputs, inputs.pop("rows"))
        # kept on the device: reading it here would make the GPU wait at every micro-batch
        self._num_tokens = (
            getattr(self, "_num_tokens", 0) + inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
        )
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.micro_batches.append((self.moment.rows, loss))
        if self.accelerator.num_processes == 1 or self.accelerator.sync_gradients:  # else not reduced yet
            self.masters.take_gradients()
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self.saving.stop.number is not None:
            raise _Left
        when = f"in the evaluation after step {self.state.global_step}"
        self.moment = Moment(when, inputs, inputs.pop("rows"), evaluates=True)
        found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if not torch.isfinite(found[0]):
            self.failure = f"the loss is {found[0].item()} {when}, with {self.moment.batch()}"
            raise _Left
        tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().to(found[0].device)
        self.evaluated += torch.stack([found[0].double() * tokens, tokens.double()])
        return found

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        # transformers takes the mean of the batches' means, whatever is in them; this is the mean over all trained tokens
        self.evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, tokens = self.evaluated.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / tokens
        return output

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The schedule of transformers, except that the warmup is never the whole run and starts above 0."""
        if self.lr_scheduler is None:
            warmup = min(math.ceil(self.args.warmup_steps * num_training_steps), num_training_steps - 1)
            warmup = 0 if self.args.lr_scheduler_type == "constant" else warmup
            self.lr_scheduler = schedule = get_scheduler(
                self.args.lr_scheduler_type, optimizer or self.optimizer, warmup, num_training_steps
            )
            rate, num_groups = schedule.lr_lambdas[0], len(schedule.lr_lambdas)  # every group has the same
            schedule.lr_lambdas = num_groups * [lambda step: (step + 1) / (warmup + 1) if step < warmup else rate(step)]
            _set_rates(schedule, 0, optimizer or self.optimizer)
        return self.lr_scheduler

    def evaluate(self, *args, **kwargs):
        with (
            self.clock.outside(),
            _same_random_numbers(self.model),
        ):  # so that a run that goes on from before an evaluation is the same run
            return super().evaluate(*args, **kwargs)

    def _evaluate(self, *args, **kwargs):
        try:
            return super()._evaluate(*args, **kwargs)
        except _Left:
            self.evaluation_due, self.control.should_evaluate = True, False
            self.control.should_save, self.control.should_training_stop = self.saving.to is not None, True
            return {}

    def last_evaluation(self):
        """Return the held-out loss after training; raises as `refuse_left` does, after a checkpoint, where it is left."""
        try:
            if self.saving.stop.number is not None:
                raise _Left
            return self.evaluate()["eval_loss"]
        except _Left:
            if self.saved_step != self.state.global_step and self.saving.to is not None:
                self.save()
            self.refuse_left()

    def refuse_left(self):
        """Raise TrainingFailed or Interrupted if training ended early."""
        if self.failure is not None:
            raise TrainingFailed(self.failure)
        if self.saving.stop.number is not None and self.saved_step == self.state.global_step:
            raise Interrupted(self.saving.stop.number)

    # ---- checkpoints: transformers says when, and finds its place among the rows; what is in them is ours ----

    def _save_checkpoint(self, model, trial):
        with self.clock.outside():
            self.save()

    def save(self):
        """Write a checkpoint of everything that later steps depend on; only between two steps."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()  # paged states are read from the host
        optimizer, numbers = checkpoints.optimizer_state(self._own_optimizer(), self.trained)
        ranks, pattern = self.trainable.schedule.state()
        parts = {"weights": self._weights(), "optimizer": optimizer, "ranks": ranks}
        self._refuse_not_finite(parts)
        emit(CheckpointBegun(self.state.global_step))
        written = self.saving.to.write(
            self.state.global_step,
            {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()},
            {
                "fingerprint": self.saving.fingerprint,
                "optimizer": numbers,
                "rank_pattern": pattern,
                "random": checkpoints.random_state(self.model.device),
                "loss": [self._total_loss_scalar, self._tr_loss.item(), self._globalstep_last_logged],
                "tokens": self.num_tokens(),
                "all_moved": self.before is None,
                "evaluation_due": self.evaluation_due,
                "watch": self.watch.state(),
                "norm": None if self.norm is None else float(self.norm),
                "step": self.state.global_step,
                "lines": self.num_lines,
                "seconds": self.clock.elapsed(),
                "outside_seconds": self.clock.outside_seconds,
            },
            dataclasses.asdict(dataclasses.replace(self.state, log_history=[], stateful_callbacks={})),
            self.save_total_limit,
        )
        self.saved_step = self.state.global_step
        emit(written)

    def refuse_nothing_taken(self):
        """Raise TrainingFailed if all steps were skipped, in a run too short for `Watch` to end it."""
        if self.watch.not_taken == self.state.global_step:
            raise TrainingFailed(
                "every step was skipped because of a non-finite loss or gradient. Lower training.learning_rate, "
                f"or look at the rows listed in {Path(self.args.output_dir) / 'metrics.jsonl'}"
            )

    def refuse_broken_weights(self):
        """Raise TrainingFailed if a weight is not finite."""
        self._refuse_not_finite({"weights": self._weights()})

    def _weights(self):
        return dict(zip(self.trained, self.masters.masters, strict=True))

    def _refuse_not_finite(self, parts):
        broken = [f"{part}/{name}" for part, tensors in parts.items() for name, tensor in tensors.items()
                  if tensor.is_floating_point() and not torch.isfinite(tensor).all()]  # fmt: skip
        if broken:
            why = f"\n  {self.failure}" if self.failure is not None else ""
            raise TrainingFailed(
                f"{broken[0]} contains non-finite values after step {self.state.global_step}; it was not saved. "
                f"Earlier checkpoints are intact: lower training.learning_rate{why}"
            )

    def _own_optimizer(self):
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _load_from_checkpoint(self, *args, **kwargs):
        """Nothing yet: the weights come with the optimizer, in float32."""

    @torch.no_grad()
    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        tensors = checkpoints.read_tensors(self.saving.resume)
        self.masters.restore(self.trained, under("weights", tensors))
        numbers = self.resumed["optimizer"]
        checkpoints.restore_optimizer(self._own_optimizer(), self.trained, under("optimizer", tensors), numbers)
        self.trainable.schedule.restore(under("ranks", tensors), self.resumed["rank_pattern"])
        schedule, step = self.lr_scheduler, self.state.global_step
        # by the schedule of this recipe: its length and its rate may have been changed on purpose
        schedule.last_epoch = step
        _set_rates(schedule, step, self._own_optimizer())
        if self.resumed["all_moved"]:
            self.before = None
        self._num_tokens = self.resumed["tokens"]
        self.watch.restore(self.resumed["watch"])
        self.norm = self.resumed["norm"]

    def _load_rng_state(self, checkpoint):
        if checkpoint is not None:
            checkpoints.restore_random_state(self.resumed["random"], self.model.device)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args):
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        # transformers 5.23 would take one more step where the last one was not an epoch's last
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begin

    def continue_counting(self):
        """Restore the counters that transformers resets at each start of training."""
        total, since, self._globalstep_last_logged = self.resumed["loss"]
        self._total_loss_scalar, self._initial_global_step = total, 0
        self._tr_loss = torch.tensor(since, device=self.args.device)
        self.saved_step = self.state.global_step

    def _clip_grad_norm(self, model):
        self.moment = Moment(f"in step {self.state.global_step + 1}, when the weights were changed")
        # once a step, however many micro-batches it has; and logged losses stay cross entropies
        if self.trainable.schedule.changes:
            self.trainable.schedule.penalty(zip(self.trained, self.masters.masters, strict=True)).backward()
        norm = self.accelerator.clip_grad_norm_(self.masters.masters, self.args.max_grad_norm)
        step = self.state.global_step + 1
        gradient, *losses = torch.stack(
            [norm, *(loss for _, loss in self.micro_batches)]
        ).tolist()  # one wait for a GPU
        if all(map(math.isfinite, [gradient, *losses])):
            self.failure = self.watch.take(step, sum(losses))
            self.norm = norm
        else:
            self._leave_out(step, gradient, losses)
        return self.norm

    def _leave_out(self, step, gradient, losses):
        """Skip this step: the optimizer changes nothing, and the mean loss is that of the other steps."""
        for master in self.masters.masters:
            master.grad = None
        self._tr_loss.copy_(self.loss_before)
        self._globalstep_last_logged += 1  # transformers divides by the steps since then
        broken = [at for at, loss in enumerate(losses) if not math.isfinite(loss)]
        rows = [
            number for at, (rows, _) in enumerate(self.micro_batches) for number in rows if at in broken or not broken
        ]
        what = f"the loss is {losses[broken[0]]}" if broken else f"the gradient is {gradient}"
        what += f" with training row{'s' * (len(rows) > 1)} {few([f'{number + 1:,}' for number in rows])}"
        failure = self.watch.leave_out(step, what)
        self.failure = failure and f"{failure}. Lower training.learning_rate, or look at these rows: qlora data --row"
        self._record(Skipped(step, self.state.epoch, what, tuple(number + 1 for number in rows), self.clock.elapsed()))

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        step, epoch = self.state.global_step, self.state.epoch
        if "loss" in logs:
            tokens = self.num_tokens()
            self._record(
                Step(
                    step,
                    epoch,
                    logs["loss"],
                    logs["learning_rate"],
                    logs["grad_norm"],
                    tokens,
                    self.clock.rate(tokens),
                    self.peak.bytes,
                    self.clock.elapsed(),
                    self.trainable.schedule.measured(),
                )
            )
        elif "eval_loss" in logs:
            self._record(Evaluation(step, epoch, logs["eval_loss"], self.clock.elapsed()))

    def _record(self, line):
        self.num_lines += 1
        emit(line)

    def num_tokens(self):
        """Return the tokens trained on so far, padding excluded."""
        return int(getattr(self, "_num_tokens", 0))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs or inputs["labels"].device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss_of_trained_positions(model, inputs, num_items_in_batch, self.lean_loss)


def _set_rates(schedule, step, optimizer):
    """Set the learning rates of the schedule for step `step`, counted from 0."""
    schedule._last_lr = [base * rate(step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


class _Left(Exception):
    """Aborts an evaluation, because training is to stop."""


def loss_of_trained_positions(model, inputs, num_items_in_batch, lean=False):
    """Return the summed cross entropy of the trained tokens over `num_items_in_batch` (their count if None).

    On a CPU trl 1.16 scores every position, masked ones too, three times over for its metrics. The head alone is a
    fifth of SmolLM2-135M, and answers are under half of the tokens. Equality with trl's loss is a test.
    lean: by kernels.loss.
    """
    targets = inputs["labels"][:, 1:]
    columns = (targets != IGNORE_INDEX).any(0).nonzero().flatten()
    body = {key: value for key, value in inputs.items() if key != "labels"}
    targets = targets[:, columns]
    trained = targets != IGNORE_INDEX
    if lean:
        base = model.get_base_model()
        hidden = loss.hidden_states(model, base.get_output_embeddings(), columns, **body)[trained]
        total = loss.cross_entropy(hidden, base.get_output_embeddings(), targets[trained])
    else:
        logits = model(**body, use_cache=False, logits_to_keep=columns).logits
        total = F.cross_entropy(logits[trained].float(), targets[trained], reduction="sum")
    return total / (trained.sum() if num_items_in_batch is None else num_items_in_batch)


@contextlib.contextmanager
def _same_random_numbers(model):
    """Restore the state of every random generator after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _undone(trainer):
    """Restore random states, counters, gradients and buffers after the block."""
    model = trainer.model
    # what trl 1.16 counts where it computes the loss
    kept = {name: copy.deepcopy(getattr(trainer, name)) for name in ("_metrics", "_total_train_tokens")}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training = model.training
    try:
        with _same_random_numbers(model):
            yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)
        for buffer, value in buffers:
            buffer.copy_(value)
        for parameter in model.parameters():
            parameter.grad = None
        model.train(training)


class Saves(TrainerCallback):
    """Has the trainer save every so many steps, at the end, and when it is to stop; puts back what it was about."""

    def __init__(self, trainer, every):
        self.trainer, self.every = trainer, every
        self.due = None  # the step since which a checkpoint is put off

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.resumed is not None:
            self.trainer.continue_counting()
            if self.trainer.resumed["evaluation_due"]:
                try:
                    self.trainer.evaluate()
                except _Left:  # the checkpoint still says so
                    self.trainer.refuse_left()

    def on_step_end(self, args, state, control, **kwargs):
        trainer, step = self.trainer, state.global_step
        kept = trainer.saving.to is not None
        if self.due is None and self.every is not None and step % self.every == 0:
            self.due = step
        if trainer.failure is not None:
            trainer.evaluation_due = control.should_evaluate
            control.should_training_stop, control.should_evaluate, control.should_log = True, False, True
            control.should_save = kept and not trainer.watch.diverged
            if kept and trainer.watch.diverged:
                trainer.saving.to.set_aside(trainer.watch.last_good_step())
        elif kept and trainer.saving.stop.number is not None:
            control.should_save = control.should_training_stop = True
        elif (
            kept and self.every is not None and (step >= state.max_steps or (self.due is not None and self._may(step)))
        ):
            control.should_save, self.due = True, None

    def _may(self, step):
        """True unless the run may be about to diverge; after so many steps it would have, and its losses are just uneven."""
        watch = self.trainer.watch
        return not watch.suspects() or step - self.due >= watch.num_steps


class Rehearsal(TrainerCallback):
    """Has the trainer rehearse the largest micro-batch that its rows, of these `lengths`, can meet in."""

    def __init__(self, trainer, lengths):
        self.trainer, self.lengths = trainer, lengths

    def on_train_begin(self, args, state, control, **kwargs):
        longest_first = np.argsort(-np.asarray(self.lengths), kind="stable")
        self.trainer.rehearse(longest_first[: args.per_device_train_batch_size])


class Begins(TrainerCallback):
    """Runs when everything is ready for the first step: the state is restored and the rehearsal has passed."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        emit(Begun(state.global_step, state.max_steps, self.trainer.num_lines))
        self.trainer.clock.begin()
        self.trainer.begun = True


class Schedule(TrainerCallback):
    """Tells the method the number of steps."""

    def __init__(self, schedule):
        self.schedule = schedule

    def on_train_begin(self, args, state, control, **kwargs):
        self.schedule.begin(state.max_steps)
