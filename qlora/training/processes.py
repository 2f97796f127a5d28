"""A training by several processes, one a card: each computes its share of every step, and all take the same step.

Each process goes through the same rows in the same order and computes some of the micro-batches of a step. Before the optimizer
the gradients of the float32 masters are summed over all, once a step; so are the losses, and whether a signal has come. What
is decided after that (clip, skip, diverged, save, stop) is decided from the same numbers, hence alike. A checkpoint holds
nothing of the number of processes, and any number may go on from it.

Not DistributedDataParallel: its hooks reduce the 16-bit gradients of the model, a micro-batch at a time or under no_sync, and
here they have gone to float32 masters by then. Nor accelerate's sharded data loader: which rows a step has would be another
question then, and the number of trained tokens, by which the loss is divided, would have to be sent around.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..base_model import Share
from ..kernels import groups
from ..runs.checkpoints import Checkpoints
from ..runs.record import CheckpointSaved
from ..system.errors import InputError, Interrupted, QLoRAError, TrainingFailed
from ..system.signals import Stop

_PATIENCE = datetime.timedelta(days=365)  # rank 0 may tokenize for hours; a process that has died is noticed at once


class Lost(TrainingFailed):
    """Another process has ended; what it had to say, it has said."""


@dataclass(frozen=True)
class Processes:
    """The processes of a training, and which of them this is. store: what they know each other by. sharded: each holds a share of
    the base, so all must run the model equally often. here: how many of them are on this machine."""

    rank: int = 0
    count: int = 1
    store: Any = None
    sharded: bool = False
    here: int = 1

    @property
    def is_first(self):
        """Whether this one writes and prints."""
        return self.rank == 0

    @property
    def share(self):
        """The base_model.Share of the base that this process holds; None for the whole base."""
        return Share(self.rank, self.count) if self.sharded else None

    def owns(self, number):
        """Whether the micro-batch of a step, or of an evaluation, with this number is computed here."""
        return number % self.count == self.rank

    def shares(self, stop):
        """Yield of one batch after another whether it is computed here; after one of each process all take note of a signal.
        stop: the Stop of the training."""
        for number in itertools.count():
            if number % self.count == 0:
                stop.agree()
            yield self.owns(number)

    def lacks_one_of(self, number):
        """Whether this process must run one more than its own of `number` micro-batches: others have one more."""
        return self.sharded and number % self.count > 0 and self.rank >= number % self.count

    def noticing(self):
        """Return the block in which a model computes; one that gathers its weights may find that another process has ended."""
        return _noticing() if self.sharded else contextlib.nullcontext()

    # ---- before the training ----

    def from_first(self, value=None):
        """Return `value` of the first process, for which the others wait however long it takes."""
        if self.count > 1:
            given = [value]
            with _noticing():
                dist.broadcast_object_list(given, src=0, device=torch.device("cpu"))
            value = given[0]
        return value

    def refuse_differing(self, fingerprint):
        """Raise InputError where the first process has another recipe, other data or another base: on another machine, maybe."""
        first = self.from_first(fingerprint)
        differing = sorted(
            name for name in first.keys() | fingerprint.keys() if first.get(name) != fingerprint.get(name)
        )
        if differing:
            raise InputError(
                f"process {self.rank} of {self.count} has another {', '.join(differing)} than the first; "
                "give all machines the same files"
            )

    def refuse_unshared(self, run_path):
        """Raise InputError where this process does not see the run folder that the first has made: it reads checkpoints there."""
        if not run_path.is_dir():
            raise InputError(
                f"process {self.rank} of {self.count} does not see the run folder {run_path}, which the first has made: it reads "
                "checkpoints there too; set an output_dir that all machines share"
            )

    def same_weights(self, masters):
        """Give the MasterWeights of all processes the numbers of the first, of shared ones those of their owners."""
        if self.sharded:
            masters.give_weights()
        elif self.count > 1:
            with _noticing(), torch.no_grad():
                for chunk in _chunks(masters.masters):
                    flat = torch.cat([master.flatten() for master in chunk])
                    dist.broadcast(flat, src=0)
                    _spread(flat, chunk)
            masters.give_weights()

    # ---- a step ----

    @contextlib.contextmanager
    def random_numbers(self, model, *numbers):
        """Draw random numbers in the block that follow from `numbers` alone, whichever process draws them; go on after it as
        if none had been drawn. Alone, as always."""
        if self.count == 1:
            yield
            return
        from .rehearsal import same_random_numbers

        with same_random_numbers(model):
            seed = 0
            for number in numbers:
                seed = (seed * 1_000_003 + int(number)) % 2**63
            torch.manual_seed(seed)
            yield

    @torch.no_grad()
    def sum_gradients(self, masters):
        """Sum the gradients of the MasterWeights over all processes; a master that none has a gradient for gets none."""
        if self.sharded:
            masters.drop_absent()  # the rest is summed after each micro-batch
        if self.count == 1 or self.sharded:
            return
        there = self.sums([master.grad is not None for master in masters.masters])
        given = [master for master, many in zip(masters.masters, there, strict=True) if many]
        for master in given:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        with _noticing():
            for chunk in _chunks(given):
                gradients = [master.grad for master in chunk]
                flat = torch.cat([gradient.flatten() for gradient in gradients])
                dist.all_reduce(flat)
                _spread(flat, gradients)

    def sums(self, numbers):
        """Return the sum over all processes of each of `numbers`, in float64."""
        if self.count == 1:
            return list(numbers)
        return self.sum_of(torch.tensor([float(number) for number in numbers], dtype=torch.float64)).tolist()

    def sum_of(self, tensor):
        """Return the sum over all processes of a tensor on the CPU, which may be the tensor itself."""
        if self.count > 1:
            with _noticing():
                dist.all_reduce(tensor)
        return tensor

    def losses_of_all(self, trainer, losses):
        """Return the losses of the micro-batches of a step, each of the process that has computed it, and give the trainer what
        all have measured of the step, and the signal that one has got. losses: 0 where another process has computed it."""
        if self.count > 1:
            sums = trainer.saving.stop.agree([*losses, *trainer.objective.measured()])
            losses, measured = sums[: len(losses)], sums[len(losses) :]
            trainer.objective.agree(measured)
            trainer.add_losses(trainer.loss_before, losses)
        return losses

    def first_said(self, text):
        """Return the first text that a process has said; None where none has."""
        if self.count == 1:
            return text
        said: list = [None] * self.count
        with _noticing():
            dist.all_gather_object(said, text)
        return next((one for one in said if one is not None), None)

    @contextlib.contextmanager
    def failing_together(self):
        """Raise in all processes the TrainingFailed that one raises in the block; whole masters fail alike everywhere."""
        if not self.sharded:
            yield
            return
        said = None
        try:
            yield
        except TrainingFailed as error:
            said = str(error)
        said = self.first_said(said)
        if said is not None:
            raise TrainingFailed(said)

    def wait(self):
        """Return once all processes are here."""
        self.sums([0])

    # ---- the end ----

    @contextlib.contextmanager
    def ended_together(self):
        """Leave the block when all do: the first may still be writing. An error that all have raised is said by the first."""
        try:
            yield
        except (TrainingFailed, Interrupted) as error:
            # what was decided from the same numbers; others, such as a full disk, are of one process alone
            if self.count > 1 and not isinstance(error, Lost):
                self.wait()
                error.is_said = not self.is_first
            raise
        self.wait()

    def has_spoken(self):
        """Whether another process has said already why it ends; from now on this one has."""
        try:
            return self.store.add("said", 1) > 1
        except RuntimeError:  # dist.DistError: the launcher is gone
            return False


ALONE = Processes()


@contextlib.contextmanager
def started(launched_as, sharded=False):
    """Yield the Processes that a launcher has started. launched_as: launched.Launched, or None for one alone. sharded: as of
    Processes.

    An error of the block is marked as said (`is_said`) where another process says it.
    """
    if launched_as is None:
        yield ALONE
        return
    _take_own_card(launched_as)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, count = next(iter(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=10))))
        store.set_timeout(_PATIENCE)
        mine = Processes(rank, count, dist.PrefixStore("qlora", store), sharded, launched_as.here)
        dist.init_process_group(backend, store=mine.store, rank=rank, world_size=count, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes do not find each other: {str(error).splitlines()[0]}") from None
    logger = logging.getLogger("transformers.training_args")
    logger.addFilter(_not_of_ddp)
    try:
        yield mine
        dist.destroy_process_group()
    except (QLoRAError, Interrupted) as error:
        if error.is_said is None:
            error.is_said = mine.has_spoken()
        raise
    finally:
        logger.removeFilter(_not_of_ddp)


def _not_of_ddp(record):
    """Whether a warning is not that the process group is not for transformers: it is not."""
    return "torch.distributed process group is initialized" not in record.getMessage()


def _take_own_card(launched_as):
    """Let this process see its own card alone."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    num_cards = torch.cuda.device_count()
    if num_cards == 0:
        return
    if num_cards < launched_as.here:
        raise InputError(f"{launched_as.here} processes for {num_cards} GPU{'s' * (num_cards > 1)}; start one a GPU")
    cards = visible.split(",") if visible else [str(card) for card in range(num_cards)]
    os.environ["CUDA_VISIBLE_DEVICES"] = cards[launched_as.local_rank]


def refuse_unsupported(recipe, count, joins=True):
    """Raise InputError for what several processes do not do. joins: whether rows can be joined, which is known of a model."""
    training = recipe.training
    rows, micro_batches = training.rows_per_step, training.gradient_accumulation_steps
    by_tokens = joins and training.tokens_per_micro_batch is not None and not recipe.data.packing
    what, many = ("row", rows) if by_tokens else ("micro-batch", micro_batches)
    if many % count:
        fitting = [number for number in range(2, many + 1) if many % number == 0]
        or_start = f", or start {' or '.join(map(str, fitting[:4]))} processes" if fitting else ""
        field = "training.gradient_accumulation_steps"
        higher = -(-micro_batches // count) * count
        smaller = f" and training.per_device_train_batch_size={rows // higher}" if rows % higher == 0 else ""
        plural = "" if many == 1 else "s" if by_tokens else "es"
        raise InputError(
            f"{field}: a step has {many} {what}{plural}, which {count} processes cannot share equally; "
            f"set {field}={higher}{smaller}{or_start}"
        )


class AgreedStop(Stop):
    """A Stop that changes only when all processes look: they stop after the same step, and save once."""

    def __init__(self, stop, processes):
        self.own, self.processes = stop, processes

    def agree(self, numbers=()):
        """Return the sums of `numbers` over all processes; take note of a signal that one of them has got."""
        *sums, signalled, count = self.processes.sums([*numbers, self.own.number or 0, self.own.number is not None])
        if count and self.number is None:
            self.number = self.own.number or round(signalled / count)
        return sums


class WrittenByFirst(Checkpoints):
    """The checkpoints of a run, for a process that writes none."""

    def write(self, step, tensors, state, trainer_state, limit=None):
        return CheckpointSaved(self.folder / f"step-{step}", step, 0, 0.0)

    def set_aside(self, step):
        pass


@contextlib.contextmanager
def _noticing():
    """Say in one line that another process has ended; gloo and NCCL say it in many."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error).lower() or not _is_of_processes(error):
            raise
        raise Lost("another process has ended, so this one does too") from None


def _is_of_processes(error):
    return isinstance(error, dist.DistError) or any(name in str(error).lower() for name in ("gloo", "nccl"))


def _chunks(tensors):
    """Yield lists of `tensors` of about groups.SENT numbers."""
    for part in groups.of([tensor.numel() for tensor in tensors], True, groups.SENT):
        yield tensors[part]


def _spread(flat, tensors):
    """Copy the numbers of `flat` into `tensors`."""
    for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
        tensor.copy_(part.view_as(tensor))
