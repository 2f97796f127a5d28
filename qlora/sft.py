"""Supervised fine-tuning: a trl SFTTrainer put together from finished parts (model, examples, settings)."""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from . import adapter, memory
from .data import IGNORE_INDEX
from .errors import TrainingFailed


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

    model: a PeftModel whose adapters alone require gradients. examples, eval_examples: data.Example lists.
    training: the recipe's section. on_log(record, total_steps): called with each line of metrics.jsonl.

    Raises:
        TrainingFailed: a loss or gradient is not finite (the step is not taken), or an adapter does not move.
    """
    memory.reset_peak()
    trainer = Trainer(
        model=model,
        args=_config(training, gradient_checkpointing, run, model.device, bool(eval_examples)),
        train_dataset=_dataset(examples),
        eval_dataset=_dataset(eval_examples) if eval_examples else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
    )
    if eval_examples:
        trainer.eval_tokens_per_row = sum(example.num_trained for example in eval_examples) / len(eval_examples)
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(_FirstStep(model))
    recorder = _Recorder(trainer, run, on_log)
    trainer.add_callback(recorder)
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
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


def _dataset(examples):
    return Dataset.from_dict({"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]})


def _config(training, gradient_checkpointing, run, device, evaluates):
    steps = training.max_steps
    return SFTConfig(
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


class Trainer(SFTTrainer):
    """trl's SFTTrainer with float32 master weights, a lean loss on the CPU, and eval losses weighted by tokens."""

    eval_tokens_per_row = None

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            make, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            live = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            masters = MasterWeights(live)
            self.optimizer = make([{"params": masters.masters, "weight_decay": self.args.weight_decay}], **arguments)
            masters.follow(self.optimizer)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        # kept on the device: reading it here would make the GPU wait at every micro-batch
        self._num_tokens = getattr(self, "_num_tokens", 0) + inputs["attention_mask"].sum()
        return super().training_step(model, inputs, num_items_in_batch)

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
    """float32 copies of bf16 adapters: the optimizer steps the copies, the model gets them rounded.

    A bf16 number has 8 bits: an update smaller than 1/256 of a weight is lost when it is added to the weight itself.
    At a learning rate of 2e-5 that is most of them; see docs/log.md for the measurement. Cost: 4 bytes a trained
    parameter (160 MB for r=16 on 7B), and as much again during the step for float32 gradients.
    """

    def __init__(self, live):
        self.live = live
        self.masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in live]

    def follow(self, optimizer):
        """Hook the two copies around `optimizer.step`."""
        optimizer.register_step_pre_hook(self._take_gradients)
        optimizer.register_step_post_hook(self._give_weights)

    def _take_gradients(self, optimizer, args, kwargs):
        gradients = [parameter.grad for parameter in self.live if parameter.grad is not None]
        if not math.isfinite(sum(torch._foreach_norm(gradients)).item()):
            raise TrainingFailed("a gradient is not finite; the step was not taken. Lower training.learning_rate")
        for master, parameter in zip(self.masters, self.live, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()

    def _give_weights(self, optimizer, args, kwargs):
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.live, strict=True):
                parameter.copy_(master)
                master.grad = None


class _FirstStep(TrainerCallback):
    """After the first step with a learning rate above 0, every B has moved, or the run stops."""

    def __init__(self, model):
        self.model = model
        self.before = {name: parameter.detach().clone() for name, parameter in adapter.lora_b(model).items()}

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.learning_rate = optimizer.param_groups[0]["lr"]  # a warmup starts at 0

    def on_step_end(self, args, state, control, **kwargs):
        if self.before is not None and self.learning_rate > 0:
            adapter.refuse_unmoved(self.model, self.before)
            self.before = None


class _Recorder(TrainerCallback):
    """Writes metrics.jsonl and TensorBoard events, and hands each record on."""

    def __init__(self, trainer, run, listener):
        from torch.utils.tensorboard import SummaryWriter

        self.trainer, self.listener = trainer, listener
        self.file = open(run.metrics_file, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self.board = SummaryWriter(str(run.tensorboard))
        self.last_time, self.last_tokens = None, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = self.last_time = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self._record(self._training_record(state, logs), state)
        elif "eval_loss" in logs:
            elapsed = time.monotonic() - self.start
            self._record({"step": state.global_step, "epoch": state.epoch, "eval_loss": logs["eval_loss"], "time": elapsed}, state)
            self.last_time = time.monotonic()  # evaluation is not training time

    def _training_record(self, state, logs):
        if not math.isfinite(logs["loss"]):
            raise TrainingFailed(f"the loss is {logs['loss']} at step {state.global_step}; lower training.learning_rate")
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
