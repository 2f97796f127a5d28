"""Supervised fine-tuning: a trl SFTTrainer put together from finished parts (model, examples, settings)."""

from __future__ import annotations

import contextlib
import json
import math
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

from . import adapter, data, memory
from .data import IGNORE_INDEX, Packs
from .errors import TrainingFailed
from .kernels.attention import within_documents
from .neftune import noisy_embeddings


@dataclass(frozen=True)
class Result:
    """What a finished run measured. Losses are nats a trained token."""

    steps: int
    loss: float
    eval_loss: float | None
    tokens: int
    seconds: float
    peak_bytes: int


def train(model, tokenizer, examples, eval_examples, training, gradient_checkpointing, run, on_log=None):
    """Train the adapters of `model` in place; return the Result.

    model: a PeftModel whose adapters alone require gradients. examples: a sequence of data.Example, data.Packs, or
    data.Batches, read when needed. eval_examples: a sequence of data.Example.
    training: the recipe's section. on_log(record, total_steps): called with each line of metrics.jsonl.

    Raises:
        TrainingFailed: a loss or gradient is not finite (the step is not taken), or an adapter does not move.
    """
    memory.reset_peak()
    packed = isinstance(examples, Packs)
    dtype = model.get_input_embeddings().weight.dtype  # now: trl casts what is trained, the embedding maybe with it
    pad = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    trainer = Trainer(
        model=model,
        args=_config(training, gradient_checkpointing, run, model.device, bool(eval_examples), packed),
        train_dataset=_dataset(examples),
        eval_dataset=_dataset(eval_examples, packed) if eval_examples else None,
        processing_class=tokenizer,
        data_collator=_join_rows if packed else lambda rows: pad(_unbatched(rows)),
    )
    if training.group_by_length:
        trainer.lengths = [int(length) for length in getattr(examples, "lengths", map(_length, examples))]
    for parameter in model.parameters():
        if parameter.requires_grad:  # trl casts the adapters of a quantized base to bf16, whatever it computes in
            parameter.data = parameter.data.to(dtype)
    if eval_examples:
        trainer.eval_tokens_per_row = _mean_trained(eval_examples)
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(_Schedule(trainer.ranks))
    recorder = _Recorder(trainer, run, on_log)
    trainer.add_callback(recorder)
    start = time.monotonic()
    try:
        alpha = training.neftune_noise_alpha
        with (
            warnings.catch_warnings(),
            within_documents(model) if packed else contextlib.nullcontext(),
            noisy_embeddings(model, alpha) if alpha else contextlib.nullcontext(),
        ):
            # known and harmless: said once in the docs instead of in every run
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            loss = trainer.train().training_loss
            eval_loss = trainer.evaluate()["eval_loss"] if eval_examples else None
    finally:
        recorder.close()
    return Result(
        steps=trainer.state.global_step,
        loss=loss,
        eval_loss=eval_loss,
        tokens=trainer.num_tokens(),
        seconds=time.monotonic() - start,
        peak_bytes=memory.peak_bytes(),
    )


def _dataset(items, alone=False):
    """Return a Dataset of nothing but numbers, whose rows are made of `items` when the trainer asks for them."""
    return Dataset.from_dict({"index": range(len(items))}).with_transform(_Made(items, alone))


class _Made:
    """{"index": numbers} -> the columns of those of `items`: Examples, Packed rows, or lists of Examples."""

    def __init__(self, items, alone):
        self.items, self.alone = items, alone

    def __getstate__(self):
        return {}  # `datasets` hashes what it is given: it must not read all rows for that

    def __call__(self, batch):
        chosen = [self.items[index] for index in batch["index"]]
        chosen = [data.alone(example) for example in chosen] if self.alone else chosen
        if isinstance(chosen[0], list):  # a micro-batch
            return {name: [[getattr(e, name) for e in item] for item in chosen] for name in ("input_ids", "labels")}
        names = ["input_ids", "labels", *(["segments"] if isinstance(chosen[0], data.Packed) else [])]
        return {name: [getattr(item, name) for item in chosen] for name in names}


def _mean_trained(examples):
    counts = getattr(examples, "num_trained", None)
    return float(np.mean([example.num_trained for example in examples] if counts is None else counts))


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


def _join_rows(rows):
    """Collate packed rows into one: no padding, positions from 0 in each document, and their lengths as `segments`."""
    segments = [length for row in rows for length in row["segments"]]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": torch.tensor([[label for row in rows for label in row["labels"]]]),
        "position_ids": torch.cat([torch.arange(length) for length in segments])[None],
        "segments": segments,
    }


def _config(training, gradient_checkpointing, run, device, evaluates, packed):
    steps = training.max_steps
    config = SFTConfig(
        output_dir=str(run.path),
        num_train_epochs=training.num_train_epochs,
        max_steps=-1 if steps is None else steps,
        per_device_train_batch_size=training.per_device_train_batch_size,
        per_device_eval_batch_size=1 if packed else training.per_device_eval_batch_size,
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
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if gradient_checkpointing else None,
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

    eval_tokens_per_row = None
    lengths: Any = None  # of the training rows, where rows of like length are to share a batch
    optimizer: Any

    def __init__(self, model, **arguments):
        self.ranks = adapter.Ranks(model)
        self.before: Any = {name: p.detach().clone() for name, p in adapter.first_to_move(model).items()}
        super().__init__(model, **arguments)

    def _get_train_sampler(self, train_dataset=None):
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(rows_per_step, lengths=self.lengths)

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

    def training_step(self, model, inputs, num_items_in_batch=None):
        # kept on the device: reading it here would make the GPU wait at every micro-batch
        self._num_tokens = (
            getattr(self, "_num_tokens", 0) + inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
        )
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.num_processes == 1 or self.accelerator.sync_gradients:  # else not reduced yet
            self.masters.take_gradients()
        return loss

    def _clip_grad_norm(self, model):
        if (
            self.ranks.adaptive
        ):  # once a step, however many micro-batches it has; and logged losses stay cross entropies
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
        return _loss_of_trained_positions(model, inputs, num_items_in_batch)


def _loss_of_trained_positions(model, inputs, num_items_in_batch):
    """Return the summed cross entropy of the trained tokens over `num_items_in_batch` (their count if None).

    On a CPU trl 1.16 scores every position, masked ones too, three times over for its metrics. The head alone is a
    fifth of SmolLM2-135M, and answers are under half of the tokens. Equality with trl's loss is a test.
    """
    targets = inputs["labels"][:, 1:]
    columns = (targets != IGNORE_INDEX).any(0).nonzero().flatten()
    body = {key: value for key, value in inputs.items() if key != "labels"}
    logits = model(**body, use_cache=False, logits_to_keep=columns).logits
    targets = targets[:, columns]
    trained = targets != IGNORE_INDEX
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
        self.file = open(run.metrics_file, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self.board = SummaryWriter(str(run.tensorboard))
        self.start = self.last_time = time.monotonic()
        self.last_tokens = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = self.last_time = time.monotonic()

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
            "memory_bytes": memory.peak_bytes(),
            "time": now - self.start,
        }
        if self.trainer.ranks.adaptive:
            record["mean_rank"] = self.trainer.ranks.mean()
        self.last_time, self.last_tokens = now, tokens
        return record

    def _record(self, record, state):
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        self.file.flush()
        for key in record.keys() - {"step", "epoch", "time"}:
            self.board.add_scalar(key, record[key], record["step"])
        if self.listener is not None:
            self.listener(record, state.max_steps)

    def close(self):
        self.file.close()
        self.board.close()
