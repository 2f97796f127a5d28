"""Supervised fine-tuning: a trl SFTTrainer put together from finished parts (model, examples, settings)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from . import adapter, base_model, checkpoints, data, kernels, memory
from .checkpoints import under
from .data import IGNORE_INDEX, Packs
from .errors import DoesNotFit, InputError, Interrupted, TrainingFailed
from .kernels import attention, loss
from .kernels.checkpointing import checkpointed
from .neftune import noisy_embeddings
from .rundir import write_json, write_text
from .signals import Stop


@dataclass(frozen=True)
class Result:
    """What a finished run measured. Losses are nats a trained token.

    seconds: from the first step to the end. peak_bytes: the most that was held; rehearsed_bytes: before the first step.
    """

    steps: int
    loss: float
    eval_loss: float | None
    tokens: int
    seconds: float
    peak_bytes: int
    rehearsed_bytes: int | None


@dataclass(frozen=True)
class Saving:
    """Where checkpoints go and come from.

    to: a checkpoints.Checkpoints, None for nowhere. fingerprint: is kept in each. resume: the folder of the one to
    continue from, which has verified. stop: has a number once training is to save and stop. on_save(Written).
    """

    to: Any = None
    fingerprint: Any = None
    resume: Any = None
    stop: Stop = dataclasses.field(default_factory=Stop)
    on_save: Any = None


def train(
    model,
    tokenizer,
    examples,
    eval_examples,
    training,
    run,
    checkpointed_layers=0,
    offload=False,
    predicted_bytes=None,
    on_log=None,
    rehearse=True,
    installed=kernels.OFF,
    saving=None,
):
    """Train the adapters of `model` in place; return the Result.

    model: a PeftModel whose adapters alone require gradients. examples: a sequence of data.Example, data.Packs, or
    data.Batches, read when needed. eval_examples: a sequence of data.Example.
    training: the recipe's section. on_log(record, total_steps): called with each line of metrics.jsonl.
    checkpointed_layers, offload: of kernels.checkpointing. predicted_bytes: what somebody expects the peak to be; is only
    written down, in memory.json, beside what was measured. rehearse: run the largest micro-batch once before the first
    step; it changes no number. installed: the kernels that the model computes with. saving: of checkpoints.

    Raises:
        Interrupted: saving.stop asked for it; a checkpoint has all that was done.
        DoesNotFit: there is not enough memory; says for which rows, and what to change.
        InputError: the layers cannot be checkpointed.
        TrainingFailed: a loss or gradient is not finite (the step is not taken), or an adapter does not move.
    """
    joined = installed.joined or isinstance(examples, Packs)
    dtype = model.get_input_embeddings().weight.dtype  # now: trl casts what is trained, the embedding maybe with it
    layers = base_model.decoder_layers(model)
    pad = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    trainer = Trainer(
        model=model,
        args=_config(training, run, model.device, bool(eval_examples)),
        train_dataset=_dataset(examples),
        eval_dataset=_dataset(eval_examples) if eval_examples else None,
        processing_class=tokenizer,
        data_collator=_numbered(lambda rows: (join_rows if joined else pad)(_unbatched(rows))),
    )
    trainer.lean_loss = installed.loss
    trainer.saving = saving = saving or Saving()
    if saving.resume is not None:
        trainer.resumed = checkpoints.read_state(saving.resume)
    lengths = _lengths(examples, joined)
    if training.group_by_length:
        trainer.lengths = lengths
    for parameter in model.parameters():
        if parameter.requires_grad:  # trl casts the adapters of a quantized base to bf16, whatever it computes in
            parameter.data = parameter.data.to(dtype)
    if eval_examples:
        rows = training.per_device_eval_batch_size if joined else 1
        trainer.eval_tokens_per_row = _num_trained(eval_examples) / -(-len(eval_examples) // rows)
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(_Schedule(trainer.ranks))
    if rehearse:
        trainer.add_callback(_Rehearsal(trainer, lengths))
    recorder = trainer.recorder = _Recorder(trainer, run, on_log)
    trainer.add_callback(recorder)
    trainer.save_total_limit = training.save_total_limit
    trainer.add_callback(_Saves(trainer, training.save_steps))
    measured: dict[str, Any] = {
        "layers": len(layers),
        "checkpointed_layers": checkpointed_layers,
        "offload": offload,
        "predicted_bytes": predicted_bytes,
    }
    trainer.peak = peak = memory.Peak()
    try:
        alpha = training.neftune_noise_alpha
        with (
            peak,
            warnings.catch_warnings(),
            checkpointed(layers, checkpointed_layers, offload),
            attention.within_documents(model, plain=not installed.joined) if joined else contextlib.nullcontext(),
            noisy_embeddings(model, alpha) if alpha else contextlib.nullcontext(),
        ):
            # known and harmless: said once in the docs instead of in every run
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            mean_loss = trainer.train(resume_from_checkpoint=saving.resume and str(saving.resume)).training_loss
            eval_loss = trainer.last_evaluation() if eval_examples else None
            if saving.stop.number is not None and trainer.saved_step == trainer.state.global_step:
                raise Interrupted(saving.stop.number)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_refusal(error):
            raise
        longest = max(map(_length, eval_examples)) if trainer.moment.evaluates else max(lengths)
        changes = _changes(training, measured, model.device.type == "cuda", trainer.moment.evaluates, longest)
        measured["out_of_memory"] = f"{trainer.moment.when}: {memory.refused(error)}"
        raise DoesNotFit(_too_much(trainer, measured, changes)) from None
    finally:
        recorder.close()
        measured |= {"rehearsed_bytes": trainer.rehearsed_bytes, "peak_bytes": peak.bytes}
        write_json(run.memory_file, measured)
    return Result(
        steps=trainer.state.global_step,
        loss=mean_loss,
        eval_loss=eval_loss,
        tokens=trainer.num_tokens(),
        seconds=time.monotonic() - recorder.start,
        peak_bytes=measured["peak_bytes"],
        rehearsed_bytes=trainer.rehearsed_bytes,
    )


def _too_much(trainer, measured, changes):
    """Return the message: when, for which rows, what was asked for and expected, and what to change, best first."""
    lines = [f"out of memory {measured['out_of_memory']}"]
    lines += [f"  {trainer.moment.batch()}"] if trainer.moment.batch() else []
    known = {"predicted": measured["predicted_bytes"], "measured in the rehearsal": trainer.rehearsed_bytes}
    peaks = [f"{word} {num_bytes / 2**30:.2f} GiB" for word, num_bytes in known.items() if num_bytes]
    lines += [f"  peak {', '.join(peaks)}"] if peaks else []
    return "\n".join([*lines, "  to make it fit, what costs least first:", *(f"    {change}" for change in changes)])


def _changes(training, measured, on_gpu, evaluates, longest):
    """Return what can be changed for less memory, what costs least first.

    evaluates: it ran out in an evaluation, which has no backward pass. longest: tokens of the longest row, pack or batch.
    """
    number, total = measured["checkpointed_layers"], measured["layers"]
    rows, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    shorter = f"set a data.max_length under {longest:,}, the longest there is, and data.overlong=truncate or split"
    if evaluates:
        rows = training.per_device_eval_batch_size
        return ([f"set training.per_device_eval_batch_size=1 (now {rows})"] if rows > 1 else []) + [shorter]
    found = []
    if training.optim != "paged_adamw_8bit":
        found.append(f"set training.optim=paged_adamw_8bit (now {training.optim})")
    if number < total:
        found.append(f"set memory.gradient_checkpointing=true (now {number} of {total} layers)")
    if rows > 1:
        found.append(
            f"set training.per_device_train_batch_size={rows // 2} training.gradient_accumulation_steps={2 * steps} "
            f"(now {rows} and {steps})"
        )
    if training.tokens_per_micro_batch:
        found.append(f"set a lower training.tokens_per_micro_batch (now {training.tokens_per_micro_batch:,})")
    if on_gpu and not measured["offload"]:
        found.append("set memory.offload=true memory.gradient_checkpointing=true")
    return [*found, shorter]


@dataclass
class Moment:
    """What the trainer is about: when, in words, and with which rows. evaluates: these are held-out rows."""

    when: str
    inputs: Any = None
    rows: Any = ()  # their numbers, from 0
    evaluates: bool = False

    def batch(self):
        """Return the rows of the micro-batch in words: which, and how long."""
        if self.inputs is None:
            return ""
        segments, width = self.inputs.get("segments"), self.inputs["input_ids"].shape[1]
        lengths = self.inputs["attention_mask"].cpu().sum(1).tolist() if segments is None else segments
        many = len(lengths) > 1
        numbers = _few([f"{number + 1:,}" for number in self.rows])
        together = f", {'padded to' if segments is None else 'joined to one row of'} {width:,}" if many else ""
        kind = "held-out" if self.evaluates else "training"
        return f"{kind} row{'s' * many} {numbers}: {_few([f'{n:,}' for n in lengths])} tokens{together}"


def _few(words, limit=8):
    return ", ".join(words[:limit]) + (f" and {len(words) - limit:,} more" if len(words) > limit else "")


def _dataset(items):
    """Return a Dataset of nothing but numbers, whose rows are made of `items` when the trainer asks for them."""
    return Dataset.from_dict({"index": range(len(items))}).with_transform(_Made(items))


class _Made:
    """{"index": numbers} -> the columns of those of `items`: Examples, Packed rows, or lists of Examples."""

    def __init__(self, items):
        self.items = items

    def __getstate__(self):
        return {}  # `datasets` hashes what it is given: it must not read all rows for that

    def __call__(self, batch):
        chosen = [self.items[index] for index in batch["index"]]
        numbers = getattr(self.items, "rows", lambda index: [index])
        rows = {"rows": [numbers(index) for index in batch["index"]]}
        names = ["input_ids", "labels", *(["segments"] if isinstance(chosen[0], data.Packed) else [])]
        if isinstance(chosen[0], list):  # a micro-batch
            return {name: [[getattr(e, name) for e in item] for item in chosen] for name in names} | rows
        return {name: [getattr(item, name) for item in chosen] for name in names} | rows


def _num_trained(examples):
    counts = getattr(examples, "num_trained", None)
    return float(np.sum([example.num_trained for example in examples] if counts is None else counts))


def _lengths(examples, joined):
    """Return the tokens of each of `examples`, as many as are computed."""
    if joined and isinstance(examples, data.Batches):
        return examples.real_lengths.tolist()
    return [int(length) for length in getattr(examples, "lengths", map(_length, examples))]


def _length(example):
    return len(example.input_ids)


def _unbatched(rows):
    """Return rows of token ids, also where each row is a micro-batch of them."""
    if not isinstance(rows[0]["input_ids"][0], list):
        return rows
    return [
        {"input_ids": ids, "labels": labels}
        for row in rows
        for ids, labels in zip(row["input_ids"], row["labels"], strict=True)
    ]


def _numbered(collate):
    """Return a collator that adds the numbers of the rows, as `rows`: they are for messages, the model does not see them."""
    return lambda rows: {**collate(rows), "rows": [number for row in rows for number in row["rows"]]}


def join_rows(rows):
    """Collate rows into one: no padding, positions from 0 in each document, and the documents' lengths as `segments`."""
    segments = [length for row in rows for length in row.get("segments") or [len(row["input_ids"])]]
    labels = torch.tensor([[label for row in rows for label in row["labels"]]])
    labels[0, np.cumsum([0, *segments[:-1]])] = IGNORE_INDEX  # what stands before it is another document
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in segments])[None],
        "segments": segments,
    }


def _config(training, run, device, evaluates):
    steps = training.max_steps
    config = SFTConfig(
        output_dir=str(run.path),
        num_train_epochs=training.num_train_epochs,
        max_steps=-1 if steps is None else steps,
        per_device_train_batch_size=training.per_device_train_batch_size,
        per_device_eval_batch_size=training.per_device_eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        optim=training.optim,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_ratio,  # a float below 1 is a share of the steps
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # the default logs 0.0 for a loss that is not finite
        eval_strategy="steps" if evaluates and training.eval_steps else "no",
        eval_steps=training.eval_steps,
        save_strategy="no",
        seed=training.seed,
        gradient_checkpointing=False,  # trl knows all layers or none; kernels.checkpointing takes some
        prediction_loss_only=True,  # an evaluation that kept logits would hold vocabulary * tokens of them
        bf16=False,  # autocast off: the model is bf16 throughout, and autocast would only add copies
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
    )
    # One process trains on one device: with several GPUs in sight the Trainer would multiply the batch by their number
    # and wrap the model in DataParallel. Reading `device` first: it is what counts them.
    assert config.device is not None
    config._n_gpu = min(1, config.n_gpu)
    return config


class Trainer(SFTTrainer):
    """trl's SFTTrainer with float32 master weights and gradients, a lean loss on the CPU, and eval losses weighted by tokens."""

    eval_tokens_per_row = None  # of a batch as the model sees it: rows that are joined are one
    lean_loss = False
    lengths: Any = None  # of the training rows, where rows of like length are to share a batch
    rehearsed_bytes = None
    peak: Any = None  # a memory.Peak
    moment = Moment("before the first step")
    micro_batches = 0  # of the step at hand
    saving = Saving()
    save_total_limit = None
    resumed: Any = None  # state.json of the checkpoint that training continues from
    saved_step = None
    evaluation_due = False  # one after this step has been left
    recorder: Any
    optimizer: Any

    def __init__(self, model, **arguments):
        self.ranks = adapter.Ranks(model)
        self.before: Any = {name: p.detach().clone() for name, p in adapter.first_to_move(model).items()}
        super().__init__(model, **arguments)

    def _get_train_sampler(self, train_dataset=None):
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _ByLength(rows_per_step, self.lengths, self.args.seed)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            make, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
            self.masters = MasterWeights([p for p in self.model.parameters() if p.requires_grad])
            groups = [{"params": self.masters.masters, "weight_decay": self.args.weight_decay}]
            self.optimizer = make(groups, **arguments)
            self.optimizer.register_step_post_hook(lambda *_: self._finish_step())
        return self.optimizer

    def _finish_step(self):
        """After the optimizer: the model gets the new weights; all have moved in the first step with a learning rate."""
        self.masters.give_weights()
        if self.before is not None and self.optimizer.param_groups[0]["lr"] > 0:  # a warmup starts at 0
            adapter.refuse_unmoved(self.model, self.before)
            self.before = None
        if self.ranks.adaptive:
            with self.masters.in_the_model():
                self.ranks.shrink(self.state.global_step + 1)
            self.masters.give_weights()
        self.masters.clear_gradients()
        self.micro_batches = 0

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

    @contextlib.contextmanager
    def _held_later(self):
        """Hold what later micro-batches find beside the model."""
        masters = self.masters.masters
        optimizer = self._own_optimizer()
        held = [torch.empty_like(m) for m in masters] if self.args.gradient_accumulation_steps > 1 else []
        if hasattr(optimizer, "init_state"):  # of bitsandbytes: what its first step begins with, paged where that is
            for at, master in enumerate(masters):
                if not optimizer.state[master]:
                    optimizer.init_state(optimizer.param_groups[0], master, 0, at)
        elif not optimizer.state:
            held += [torch.empty_like(m) for m in masters for _ in ("exp_avg", "exp_avg_sq")]
        yield
        held.clear()

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.micro_batches += 1
        when = f"in step {self.state.global_step + 1}, micro-batch {self.micro_batches}"
        self.moment = Moment(when, inputs, inputs.pop("rows"))
        # kept on the device: reading it here would make the GPU wait at every micro-batch
        self._num_tokens = (
            getattr(self, "_num_tokens", 0) + inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
        )
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.num_processes == 1 or self.accelerator.sync_gradients:  # else not reduced yet
            self.masters.take_gradients()
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self.saving.stop.number is not None:
            raise _Left
        when = f"in the evaluation after step {self.state.global_step}"
        self.moment = Moment(when, inputs, inputs.pop("rows"), evaluates=True)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluate(self, *args, **kwargs):
        with _same_random_numbers(self.model):  # so that a run that goes on from before an evaluation is the same run
            return super().evaluate(*args, **kwargs)

    def _evaluate(self, *args, **kwargs):
        try:
            return super()._evaluate(*args, **kwargs)
        except _Left:
            self.evaluation_due, self.control.should_evaluate = True, False
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def last_evaluation(self):
        """Return the held-out loss after training; raises Interrupted, after a checkpoint, where it is to stop."""
        try:
            if self.saving.stop.number is not None:
                raise _Left
            return self.evaluate()["eval_loss"]
        except _Left:
            if self.saved_step != self.state.global_step:
                self.save()
            raise Interrupted(self.saving.stop.number) from None

    # ---- checkpoints: transformers says when, and finds its place among the rows; what is in them is ours ----

    def _save_checkpoint(self, model, trial):
        self.save()

    def save(self):
        """Write a checkpoint of all that the steps to come depend on; only between two steps."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()  # paged states are read from the host
        optimizer, numbers = checkpoints.optimizer_state(self._own_optimizer(), self.trained)
        ranks, pattern = self.ranks.state()
        weights = dict(zip(self.trained, self.masters.masters, strict=True))
        parts = {"weights": weights, "optimizer": optimizer, "ranks": ranks}
        broken = [f"{part}/{name}" for part in ("weights", "optimizer") for name, t in parts[part].items()
                  if t.is_floating_point() and not torch.isfinite(t).all()]  # fmt: skip
        if broken:
            raise TrainingFailed(
                f"{broken[0]} holds numbers that are not finite after step {self.state.global_step}; it was not saved. "
                "Earlier checkpoints are as they were: lower training.learning_rate"
            )
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
                **self.recorder.state(),
            },
            dataclasses.asdict(dataclasses.replace(self.state, log_history=[], stateful_callbacks={})),
            self.save_total_limit,
        )
        self.saved_step = self.state.global_step
        if self.saving.on_save is not None:
            self.saving.on_save(written)

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
        self.ranks.restore(under("ranks", tensors), self.resumed["rank_pattern"])
        schedule, step = self.lr_scheduler, self.state.global_step
        # by the schedule of this recipe: its length and its rate may have been changed on purpose
        schedule.last_epoch = step
        schedule._last_lr = [
            base * rate(step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self._own_optimizer().param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate
        if self.resumed["all_moved"]:
            self.before = None
        self._num_tokens = self.resumed["tokens"]

    def _load_rng_state(self, checkpoint):
        if checkpoint is not None:
            checkpoints.restore_random_state(self.resumed["random"], self.model.device)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args):
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        # transformers 5.23 would take one more step where the last one was not an epoch's last
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begin

    def continue_counting(self):
        """Put back what transformers begins anew with every training."""
        total, since, self._globalstep_last_logged = self.resumed["loss"]
        self._total_loss_scalar, self._initial_global_step = total, 0
        self._tr_loss = torch.tensor(since, device=self.args.device)
        self.saved_step = self.state.global_step

    def _clip_grad_norm(self, model):
        self.moment = Moment(f"in step {self.state.global_step + 1}, when the weights were changed")
        # once a step, however many micro-batches it has; and logged losses stay cross entropies
        if self.ranks.adaptive:
            self.ranks.penalty(zip(self.trained, self.masters.masters, strict=True)).backward()
        norm = self.accelerator.clip_grad_norm_(self.masters.masters, self.args.max_grad_norm)
        if not math.isfinite(norm):
            raise TrainingFailed(
                f"the gradient at step {self.state.global_step + 1} is not finite; the step was not taken. "
                "Lower training.learning_rate, or look for a broken row"
            )
        return norm

    def num_tokens(self):
        """Return the tokens trained on so far, padding excluded."""
        return int(getattr(self, "_num_tokens", 0))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if num_items_in_batch is None and self.eval_tokens_per_row is not None:
            # a mean over rows of sum / (tokens a row) is the mean over all trained tokens, however long the rows are
            num_items_in_batch = self.eval_tokens_per_row * len(inputs["labels"])
        if return_outputs or inputs["labels"].device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss_of_trained_positions(model, inputs, num_items_in_batch, self.lean_loss)


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


class MasterWeights:
    """float32 copies of bf16 adapters: gradients are summed and steps taken in the copies, the model gets them rounded.

    A bf16 number has 8 bits: an update under 1/256 of a weight is lost when it is added to the weight itself, and so is
    a micro-batch's gradient beside the sum of those before. docs/log.md has the measurement. Cost: 8 bytes a trained
    parameter (320 MB for r=16 on 7B).

    A parameter with an attribute `held`, an index, keeps those numbers; zero gradients alone do not see to that, because
    8-bit optimizers round a zero to something else where larger numbers share its block (bitsandbytes 0.50.2).
    """

    def __init__(self, live):
        self.live = live
        self.masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in live]

    def take_gradients(self):
        """Add the model's gradients to the masters' and clear them."""
        for master, parameter in zip(self.masters, self.live, strict=True):
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                if hasattr(parameter, "held"):
                    gradient[parameter.held] = 0
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    @torch.no_grad()
    def restore(self, names, tensors):
        """Take over `tensors`, {name: float32}, and give them to the model.

        Raises:
            InputError: they are of other parameters, or of other shapes.
        """
        here, there = ({name: tuple(tensor.shape) for name, tensor in pairs}
                       for pairs in (zip(names, self.masters, strict=True), tensors.items()))  # fmt: skip
        if here != there:
            differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            name = differing[0]
            raise InputError(
                f"the checkpoint is of another adapter: {len(differing)} tensors differ, {name} is {there.get(name)} there "
                f"and {here.get(name)} here; training cannot go on with another lora section"
            )
        for name, master, parameter in zip(names, self.masters, self.live, strict=True):
            master.copy_(tensors[name])
            parameter.copy_(master)

    @torch.no_grad()
    def give_weights(self):
        """Round the masters into the model."""
        for master, parameter in zip(self.masters, self.live, strict=True):
            if hasattr(parameter, "held"):
                master[parameter.held] = parameter[parameter.held].to(master.dtype)
            parameter.copy_(master)

    def clear_gradients(self):
        for master in self.masters:
            master.grad = None

    @contextlib.contextmanager
    def in_the_model(self):
        """Let the model hold the masters themselves, with their gradients, while the block runs."""
        rounded = [parameter.data for parameter in self.live]
        for master, parameter in zip(self.masters, self.live, strict=True):
            parameter.data = master.data
            parameter.grad = torch.zeros_like(master) if master.grad is None else master.grad
        try:
            yield
        finally:
            for parameter, data in zip(self.live, rounded, strict=True):
                parameter.grad = None
                parameter.data = data


@contextlib.contextmanager
def _same_random_numbers(model):
    """Leave every generator as it was before the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _undone(trainer):
    """Leave random numbers, counters, gradients and buffers as they were before the block."""
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


class _Left(Exception):
    """An evaluation is not finished, because training is to stop."""


class _ByLength(LengthGroupedSampler):
    """Rows of like length together, in an order that is that of the epoch's number, whenever training began."""

    epoch = 0

    def __init__(self, rows_per_step, lengths, seed):
        super().__init__(rows_per_step, lengths=lengths, generator=torch.Generator())
        self.seed = seed

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class _Saves(TrainerCallback):
    """Has the trainer save every so many steps, at the end, and when it is to stop; puts back what it was about."""

    def __init__(self, trainer, every):
        self.trainer, self.every = trainer, every

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.resumed is not None:
            self.trainer.continue_counting()
            if self.trainer.resumed["evaluation_due"]:
                try:
                    self.trainer.evaluate()
                except _Left:  # the checkpoint still says so
                    raise Interrupted(self.trainer.saving.stop.number) from None

    def on_step_end(self, args, state, control, **kwargs):
        trainer, step = self.trainer, state.global_step
        if trainer.saving.to is None:
            return
        if trainer.saving.stop.number is not None:
            control.should_save = control.should_training_stop = True
        elif self.every is not None and (step % self.every == 0 or step >= state.max_steps):
            control.should_save = True


class _Rehearsal(TrainerCallback):
    """Has the trainer rehearse the largest micro-batch that its rows, of these `lengths`, can meet in."""

    def __init__(self, trainer, lengths):
        self.trainer, self.lengths = trainer, lengths

    def on_train_begin(self, args, state, control, **kwargs):
        longest_first = np.argsort(-np.asarray(self.lengths), kind="stable")
        self.trainer.rehearse(longest_first[: args.per_device_train_batch_size])


class _Schedule(TrainerCallback):
    """Tells AdaLoRA how many steps there will be."""

    def __init__(self, ranks):
        self.ranks = ranks

    def on_train_begin(self, args, state, control, **kwargs):
        self.ranks.begin(state.max_steps)


class _Recorder(TrainerCallback):
    """Writes metrics.jsonl and TensorBoard events, and hands each record on."""

    def __init__(self, trainer, run, listener):
        from torch.utils.tensorboard import SummaryWriter

        self.trainer, self.listener = trainer, listener
        self.lines = self.last_tokens = 0
        self.seconds = 0.0  # of the run, before this process went on with it
        if trainer.resumed is not None:
            self.lines, self.seconds, self.last_tokens = (trainer.resumed[k] for k in ("lines", "seconds", "tokens"))
            _cut(run.metrics_file, self.lines)
        self.file = open(run.metrics_file, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self.board = SummaryWriter(str(run.tensorboard), purge_step=trainer.resumed and trainer.resumed["step"] + 1)
        self.start = time.monotonic() - self.seconds
        self.last_time = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.last_time = time.monotonic() - self.seconds, time.monotonic()

    def state(self):
        """Return where the records end; they are on the disk then."""
        os.fsync(self.file.fileno())
        step = self.trainer.state.global_step
        return {"step": step, "lines": self.lines, "seconds": time.monotonic() - self.start}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self._record(self._training_record(state, logs), state)
        elif "eval_loss" in logs:
            elapsed = time.monotonic() - self.start
            self._record(
                {"step": state.global_step, "epoch": state.epoch, "eval_loss": logs["eval_loss"], "time": elapsed},
                state,
            )
            self.last_time = time.monotonic()  # evaluation is not training time

    def _training_record(self, state, logs):
        if not math.isfinite(logs["loss"]):
            raise TrainingFailed(
                f"the loss is {logs['loss']} at step {state.global_step}; lower training.learning_rate"
            )
        now, tokens = time.monotonic(), self.trainer.num_tokens()
        record = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens": tokens,
            "tokens_per_second": (tokens - self.last_tokens) / max(now - self.last_time, 1e-9),
            "memory_bytes": self.trainer.peak.bytes,
            "time": now - self.start,
        }
        if self.trainer.ranks.adaptive:
            record["mean_rank"] = self.trainer.ranks.mean()
        self.last_time, self.last_tokens = now, tokens
        return record

    def _record(self, record, state):
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        self.file.flush()
        self.lines += 1
        for key in record.keys() - {"step", "epoch", "time"}:
            self.board.add_scalar(key, record[key], record["step"])
        if self.listener is not None:
            self.listener(record, state.max_steps)

    def close(self):
        self.file.close()
        self.board.close()


def _cut(path, num_lines):
    """Leave the first `num_lines` lines of a file: what comes after will be computed again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    write_text(path, "".join(lines[:num_lines]))
