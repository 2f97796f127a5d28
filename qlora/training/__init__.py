"""Supervised fine-tuning: a trl SFTTrainer put together from finished parts (model, examples, settings)."""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .. import base_model, kernels
from ..data import Packs
from ..kernels import attention
from ..kernels.checkpointing import checkpointed
from ..runs import checkpoints
from ..runs.record import recorded
from ..system import memory
from ..system.errors import DoesNotFit
from ..system.storage import write_json
from . import rows
from .clock import Clock
from .masters import MasterWeights
from .neftune import noisy_embeddings
from .rows import join_rows
from .shortage import too_much, what_would_help
from .trainer import Begins, Rehearsal, Saves, Saving, Schedule, Trainer, loss_of_trained_positions
from .watchdog import Watch

__all__ = ["MasterWeights", "Result", "Saving", "Trainer", "join_rows", "loss_of_trained_positions", "train"]


@dataclass(frozen=True)
class Result:
    """What a finished run measured. Losses are nats a trained token.

    seconds: from the first step to the end; step_seconds: without evaluations and checkpoints. peak_bytes: the most that
    was held; rehearsed_bytes: before the first step.
    """

    steps: int
    loss: float
    eval_loss: float | None
    tokens: int
    seconds: float
    step_seconds: float
    peak_bytes: int
    rehearsed_bytes: int | None


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
    rehearse=True,
    installed=kernels.OFF,
    saving=None,
):
    """Train the adapters of `model` in place; return the Result.

    model: a PeftModel whose adapters alone require gradients. examples: a sequence of data.Example, data.Packs, or
    data.Batches, read when needed. eval_examples: a sequence of data.Example.
    training: the recipe's section.
    checkpointed_layers, offload: of kernels.checkpointing. predicted_bytes: what somebody expects the peak to be; is only
    written down, in memory.json, beside what was measured. rehearse: run the largest micro-batch once before the first
    step; it changes no number. installed: the kernels that the model computes with. saving: of checkpoints.

    Raises:
        Interrupted: saving.stop asked for it; a checkpoint has all that was done.
        DoesNotFit: there is not enough memory; says for which rows, and what to change.
        InputError: the layers cannot be checkpointed.
        TrainingFailed: a few losses or gradients are not finite (such a step is not taken), the loss has diverged, or an
            adapter does not move.
    """
    joined = installed.joined or isinstance(examples, Packs)
    dtype = model.get_input_embeddings().weight.dtype  # now: trl casts what is trained, the embedding maybe with it
    layers = base_model.decoder_layers(model)
    pad = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    trainer = Trainer(
        model=model,
        # of rows that are sorted by length, the first ones say nothing about the others
        watch=Watch(training.watchdog_steps, **({"first": math.inf} if training.group_by_length else {})),
        args=_config(training, run, model.device, bool(eval_examples)),
        train_dataset=rows.dataset(examples),
        eval_dataset=rows.dataset(eval_examples) if eval_examples else None,
        processing_class=tokenizer,
        data_collator=rows.numbered(lambda batch: (join_rows if joined else pad)(rows.unbatched(batch))),
    )
    trainer.lean_loss = installed.loss
    trainer.saving = saving = saving or Saving()
    if saving.resume is not None:
        trainer.resumed = resumed = checkpoints.read_state(saving.resume)
        trainer.num_lines = resumed["lines"]
        trainer.clock = Clock(resumed["seconds"], resumed["outside_seconds"], resumed["tokens"])
    else:
        trainer.clock = Clock()
    lengths = rows.lengths_of(examples, joined)
    if training.group_by_length:
        trainer.lengths = lengths
    for parameter in model.parameters():
        if parameter.requires_grad:  # trl casts the adapters of a quantized base to bf16, whatever it computes in
            parameter.data = parameter.data.to(dtype)
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(Schedule(trainer.trainable.schedule))
    if rehearse:
        trainer.add_callback(Rehearsal(trainer, lengths))
    trainer.add_callback(Begins(trainer))
    trainer.save_total_limit = training.save_total_limit
    trainer.add_callback(Saves(trainer, training.save_steps))
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
            recorded(run),
            peak,
            warnings.catch_warnings(),
            checkpointed(layers, checkpointed_layers, offload),
            attention.within_documents(model, plain=not installed.joined) if joined else contextlib.nullcontext(),
            noisy_embeddings(model, alpha) if alpha else contextlib.nullcontext(),
        ):
            # known and harmless: said once in the docs instead of in every run
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            mean_loss = trainer.train(resume_from_checkpoint=saving.resume and str(saving.resume)).training_loss
            if trainer.failure is not None:
                trainer.refuse_left()
            trainer.refuse_nothing_taken()
            trainer.refuse_broken_weights()
            eval_loss = trainer.last_evaluation() if eval_examples else None
            trainer.refuse_left()
    except (RuntimeError, MemoryError) as error:
        if not memory.is_refusal(error):
            raise
        longest = max(map(rows.length, eval_examples)) if trainer.moment.evaluates else max(lengths)
        changes = what_would_help(training, measured, model.device.type == "cuda", trainer.moment.evaluates, longest)
        measured["out_of_memory"] = f"{trainer.moment.when}: {memory.refused(error)}"
        raise DoesNotFit(too_much(trainer, measured, changes)) from None
    finally:
        measured |= {"rehearsed_bytes": trainer.rehearsed_bytes, "peak_bytes": peak.bytes}
        if trainer.begun or saving.resume is None:  # what a run has measured stays where it could not go on
            write_json(run.memory_file, measured)
    steps, seconds = trainer.state.global_step, trainer.clock.elapsed()
    return Result(
        steps=steps,
        loss=mean_loss * steps / (steps - trainer.watch.not_taken),  # transformers divides by all
        eval_loss=eval_loss,
        tokens=trainer.num_tokens(),
        seconds=seconds,
        step_seconds=seconds - trainer.clock.outside_seconds,
        peak_bytes=measured["peak_bytes"],
        rehearsed_bytes=trainer.rehearsed_bytes,
    )


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
        # the norm is computed in any case: it tells whether a step is finite
        max_grad_norm=training.max_grad_norm or math.inf,  # 0 is no clipping too, as in transformers
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
