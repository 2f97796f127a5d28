"""A training: model, rows and settings go in, a Result comes out; what happens on the way is told as events."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import base_model, kernels
from ..data import Batches, Packs
from ..kernels import attention
from ..kernels.checkpointing import Checkpointing
from ..runs.record import recorded
from ..system import memory
from ..system.errors import DoesNotFit
from ..system.storage import write_json
from .arguments import arguments_of
from .best import best_of
from .less_memory import Economy
from .neftune import noisy_embeddings
from .objectives.classification import lengths_of
from .objectives.supervised import Supervised
from .out_of_memory import too_much, what_would_help
from .processes import ALONE, Processes
from .reliability import Reliability
from .reserve import Reserve
from .saving import Saving, save_unfinished

__all__ = ["Result", "Rows", "Saving", "Settings", "train"]


@dataclass(frozen=True)
class Rows:
    """What is trained on, and what is held out. train: a sequence of data.Example, data.Packs, or data.Batches, read when
    needed. held_out: a sequence of data.Example."""

    train: Sequence
    held_out: Sequence = ()


@dataclass(frozen=True)
class Settings:
    """How it is trained.

    training: the recipe's section. checkpointed_layers, offload: of kernels.checkpointing; fixed_layers: the recipe says so
    many, which is mentioned where they do not fit. predicted_bytes: what somebody expects the peak to be, limit_bytes: what
    there is, both in the terms of memory.Peak: where the rehearsal leaves too little of it, more layers are checkpointed.
    predicted_components: {component: bytes} of it, for memory.json.
    tokens_per_micro_batch: the rows of a step are joined into micro-batches of at most so many, where the model's rows can be
    joined and are not packed already; None: as many rows as the section says. rehearse: run the largest micro-batch once
    before the first step; it changes no number. installed: the kernels that the model computes with. objective: an
    objectives.Objective; None: the supervised one. samples: yields answers at each evaluation, see
    samples.answered; None for none. processes: that share each step.
    """

    training: Any
    checkpointed_layers: int = 0
    offload: bool = False
    fixed_layers: bool = False
    predicted_bytes: int | None = None
    limit_bytes: int | None = None
    tokens_per_micro_batch: int | None = None
    rehearse: bool = True
    installed: kernels.Installed = field(default_factory=kernels.Installed)
    objective: Any = None
    predicted_components: Mapping = field(default_factory=dict)
    samples: Callable | None = None
    processes: Processes = ALONE


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

    def numbers(self):
        """Return {"final_loss", ...} for trackers."""
        found = {"final_loss": self.loss, "final_eval_loss": self.eval_loss, "final_tokens": self.tokens}
        found |= {"final_seconds": self.seconds, "final_peak_bytes": self.peak_bytes}
        return {name: value for name, value in found.items() if value is not None}


def train(model, tokenizer, rows: Rows, settings: Settings, run, saving=None) -> Result:
    """Train the adapters of `model`, a PeftModel whose adapters alone require gradients, in place.

    run: a RunDir; gets metrics.jsonl, tensorboard/ and memory.json. saving: of checkpoints; None for none.
    Emits the events of runs/record.py.

    Raises:
        Interrupted: saving.stop asked for it; a checkpoint has all that was done.
        DoesNotFit: there is not enough memory; says for which rows, and what to change.
        InputError: the layers cannot be checkpointed.
        TrainingFailed: a few losses or gradients are not finite (such a step is not taken), the loss has diverged, or an
            adapter does not move.
    """
    joined, section = settings.installed.joined or isinstance(rows.train, Packs), settings.training
    tokens = None if not joined or isinstance(rows.train, (Packs, Batches)) else settings.tokens_per_micro_batch
    objective = settings.objective or Supervised(
        tokenizer, joined, settings.installed.loss, tokens, settings.processes.count
    )
    economy = _economy(model, settings)
    trainer = _trainer(model, objective, rows, settings, run, saving or Saving(), economy)
    measured: dict[str, Any] = economy.said()
    measured |= {"predicted_bytes": settings.predicted_bytes, "limit_bytes": settings.limit_bytes}
    measured |= {"predicted_components": dict(settings.predicted_components), "tokens_per_micro_batch": tokens}
    try:
        with recorded(run, "tensorboard" in section.report_to), _computing(model, economy.layers, settings, joined):
            loss, eval_loss = trainer.fit()
    except memory.MAY_BE_REFUSALS as error:
        if not memory.is_refusal(error):
            raise
        measured |= economy.said()
        measured["out_of_memory"] = f"{trainer.moment.when}: {memory.refused(error)}"
        evaluates = trainer.moment.evaluates
        longest = max(lengths_of(rows.held_out)) if evaluates else max(trainer.reliability.lengths)
        changes = what_would_help(section, measured, model.device.type == "cuda", evaluates, longest)
        message = too_much(trainer, measured, changes)
        memory.release(error)
        memory.free_cached()
        save_unfinished(trainer)
        raise DoesNotFit(message) from None
    finally:
        measured |= economy.said() | {"rehearsed_bytes": trainer.rehearsed_bytes, "peak_bytes": trainer.peak.bytes}
        measured["measured_components"] = _held(trainer)
        if trainer.begun or trainer.resumed is None:  # what a run has measured stays where it could not go on
            write_json(run.memory_file, measured)
    seconds = trainer.clock.elapsed()
    return Result(
        steps=trainer.state.global_step,
        loss=loss,
        eval_loss=eval_loss,
        tokens=trainer.num_tokens(),
        seconds=seconds,
        step_seconds=seconds - trainer.clock.outside_seconds,
        peak_bytes=measured["peak_bytes"],
        rehearsed_bytes=trainer.rehearsed_bytes,
    )


def _held(trainer) -> dict:
    """Return {component: bytes} of what can be counted at the end, in the planner's terms: the adapter with its masters, the
    optimizer's states, and on a GPU the weights, which on a CPU may be mapped files."""
    trained, optimizer = getattr(trainer, "trained", None), trainer.own_optimizer
    if trained is None or optimizer is None:
        return {}
    live = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    states = [value for value in states if not getattr(value, "is_paged", False)]  # those are the driver's
    found = {
        "adapter": base_model.num_bytes([*live, *trained.masters.masters]),
        "optimizer": base_model.num_bytes(states),
    }
    if trainer.model.device.type == "cuda":
        on_gpu = [tensor for tensor in base_model.tensors(trainer.model) if tensor.is_cuda]
        found["weights"] = base_model.num_bytes(on_gpu) - base_model.num_bytes(live)
    return found


def _economy(model, settings):
    layers = Checkpointing(base_model.decoder_layers(model), settings.checkpointed_layers, settings.offload)
    reserve = Reserve(settings.limit_bytes, settings.predicted_bytes)
    return Economy(layers, settings.fixed_layers, reserve, retries=not settings.processes.sharded)


def _trainer(model, objective, rows, settings, run, saving, economy):
    """Return the Reliable trainer of these. Where the objective makes the micro-batches, its batch is a whole step."""
    section, tokens = settings.training, objective.tokens
    arguments = arguments_of(section, run.path, model.device, bool(rows.held_out))
    if tokens is not None:
        arguments |= {"per_device_train_batch_size": section.rows_per_step, "gradient_accumulation_steps": 1}
    reliability = Reliability(
        rehearse=settings.rehearse,
        group_by_length=section.group_by_length,
        tokens=tokens,
        watchdog_steps=section.watchdog_steps,
        saving=saving,
        economy=economy,
        best=best_of(section),
        samples=settings.samples,
        processes=settings.processes,
    )
    return objective.trainer(model, rows, arguments, reliability)


@contextlib.contextmanager
def _computing(model, layers, settings, joined):
    """Have the model compute as the settings say while the block runs."""
    alpha = settings.training.neftune_noise_alpha
    with (
        warnings.catch_warnings(),
        layers,
        attention.within_documents(model, plain=not settings.installed.joined) if joined else contextlib.nullcontext(),
        noisy_embeddings(model, alpha) if alpha else contextlib.nullcontext(),
    ):
        # known and harmless: said once in the docs instead of in every run
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield
