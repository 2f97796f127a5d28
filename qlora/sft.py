"""Supervised fine-tuning: a trl SFTTrainer put together from finished parts (model, examples, settings)."""

from __future__ import annotations

import contextlib
import copy
import json
import math
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

from . import adapter, base_model, data, kernels, memory
from .data import IGNORE_INDEX, Packs
from .errors import DoesNotFit, InputError, TrainingFailed
from .kernels import attention, loss
from .kernels.checkpointing import checkpointed
from .neftune import noisy_embeddings
from .rundir import write_json


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
    predicted_bytes: int | None


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
):
    """Train the adapters of `model` in place; return the Result.

    model: a PeftModel whose adapters alone require gradients. examples: a sequence of data.Example, data.Packs, or
    data.Batches, read when needed. eval_examples: a sequence of data.Example.
    training: the recipe's section. on_log(record, total_steps): called with each line of metrics.jsonl.
    checkpointed_layers, offload: of kernels.checkpointing. predicted_bytes: what somebody expects the peak to be; is only
    written down, in memory.json, beside what was measured. rehearse: run the largest micro-batch once before the first
    step; it changes no number. installed: the kernels that the model computes with.

    Raises:
        DoesNotFit: there is not enough memory; says for which rows, and what to change.
        InputError: the layers cannot be checkpointed.
        TrainingFailed: a loss or gradient is not finite (the step is not taken), or an adapter does not move.
    """
    joined = installed.joined or isinstance(examples, Packs)
    if joined and not installed.joined and not attention.joins(model.get_base_model()):
        raise InputError("data.packing: rows of this architecture cannot be joined; set data.packing=false")
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
    recorder = _Recorder(trainer, run, on_log)
    trainer.add_callback(recorder)
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
            mean_loss = trainer.train().training_loss
            eval_loss = trainer.evaluate()["eval_loss"] if eval_examples else None
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
        predicted_bytes=predicted_bytes,
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
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        held = [torch.empty_like(m) for m in masters] if self.args.gradient_accumulation_steps > 1 else []
        if hasattr(optimizer, "init_state"):  # of bitsandbytes: what its first step begins with, paged where that is
            for at, master in enumerate(masters):
                if not optimizer.state[master]:
                    optimizer.init_state(optimizer.param_groups[0], master, 0, at)
        else:
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
        when = f"in the evaluation after step {self.state.global_step}"
        self.moment = Moment(when, inputs, inputs.pop("rows"), evaluates=True)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

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
def _undone(trainer):
    """Leave random numbers, counters, gradients and buffers as they were before the block."""
    model = trainer.model
    # what trl 1.16 counts where it computes the loss
    kept = {name: copy.deepcopy(getattr(trainer, name)) for name in ("_metrics", "_total_train_tokens")}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training, python, numpy = model.training, random.getstate(), np.random.get_state()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for name, value in kept.items():
            setattr(trainer, name, value)
        for buffer, value in buffers:
            buffer.copy_(value)
        for parameter in model.parameters():
            parameter.grad = None
        model.train(training)


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
        for key in record.keys() - {"step", "epoch", "time"}:
            self.board.add_scalar(key, record[key], record["step"])
        if self.listener is not None:
            self.listener(record, state.max_steps)

    def close(self):
        self.file.close()
        self.board.close()
