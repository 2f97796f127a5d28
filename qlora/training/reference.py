"""The log probabilities that preference training compares with: those of the model as it is when training begins.

An adapter that starts as nothing is the base; one that is trained further is that adapter. They are computed once, before the
first step, and kept in the run folder, where a run that goes on reads them: by then the model is another.

# N rows of E sequences: 2 of a pair, 1 of an unpaired answer
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..runs.folder import RunDir
from ..system.errors import InputError, Interrupted
from ..system.events import progress
from ..system.storage import write_bytes
from .objectives.classification import lengths_of
from .out_of_memory import Moment
from .rehearsal import same_random_numbers


def settle(trainer, objective):
    """Give the trainer's rows their log probabilities, and the run folder too; those of the run that it goes on with.

    Raises:
        InputError: a run that goes on has none, or of other rows.
        Interrupted: by a signal.
    """
    file = RunDir(Path(trainer.args.output_dir)).reference_file
    datasets, processes = objective.compared(trainer), trainer.processes
    if trainer.resumed is not None:
        found = processes.from_first(_read(file, datasets) if processes.is_first else None)
    else:
        found = {name: _computed(trainer, objective, rows, name) for name, rows in datasets.items()}
        if processes.is_first:
            write_bytes(file, save(found, {name: _digest(rows.examples) for name, rows in datasets.items()}))
    for name, rows in datasets.items():
        rows.logps_NE = found[name]


def _read(file, datasets):
    """Return {name: (N, E)} that `file` has; raises InputError where it is missing, damaged, or of other rows."""
    why = "and the model that it was computed with has been trained since; restore it, or start a new run"
    try:
        with safe_open(file, "pt") as kept:
            digests = kept.metadata() or {}
            found = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 (no dict)
    except FileNotFoundError:
        raise InputError(f"{file} is missing, {why}") from None
    except (SafetensorError, OSError):
        raise InputError(f"{file} is damaged, {why}") from None
    for name, rows in datasets.items():
        if digests.get(name) != _digest(rows.examples):
            raise InputError(f"{file} is of other rows ({name.replace('_', ' ')}), {why}")
    return found


def _digest(examples):
    """Return a hash of the rows and their order, and of how long their tokens are: rows may be cut or templated otherwise."""
    return hashlib.sha256(_keys(examples).tobytes() + np.array(lengths_of(examples), np.int64).tobytes()).hexdigest()


def _keys(examples):
    """Return a number for each pair that is equal for equal ones."""
    if hasattr(examples, "numbers"):  # not read from disk one by one
        return examples.numbers("pair", np.uint64)
    said = (np.array([*one.input_ids, -1, *one.labels]).tobytes() for one in examples)
    return np.array([int.from_bytes(hashlib.blake2b(one, digest_size=8).digest(), "little") for one in said], np.uint64)


@torch.no_grad()
def _computed(trainer, objective, rows, name):
    """Return (N, E): each row once, however often it is there; in the order of their lengths, up to a micro-batch at a time, each
    by one of the processes."""
    model, lengths = trainer.model, np.array(lengths_of(rows.examples))
    _, first, where = np.unique(_keys(rows.examples), return_index=True, return_inverse=True)
    order = first[np.argsort(-lengths[first], kind="stable")]
    most = objective.tokens or int(np.sort(lengths)[::-1][: trainer.args.per_device_train_batch_size].sum())
    found, training, at, processes = torch.zeros_like(rows.logps_NE), model.training, 0, trainer.processes
    shares, num_batches, batch = processes.shares(trainer.saving.stop), 0, {}
    model.eval()
    try:
        with progress("computing the reference", len(order), "rows") as advance, same_random_numbers(model):
            while at < len(order):
                is_mine, num_batches = next(shares), num_batches + 1
                if trainer.saving.stop.number is not None:
                    raise Interrupted(trainer.saving.stop.number)
                size = max(1, int(most // lengths[order[at]]))
                some = order[at : at + size]
                batch = objective.collate([rows[int(number)] for number in some])
                batch.pop("rows")
                trainer.moment = Moment(
                    "in the reference's log probabilities, before the first step", batch, some.tolist()
                )
                batch = {n: v.to(model.device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
                if is_mine:
                    found[torch.from_numpy(some)] = objective.log_probabilities(model, batch)[0].float().cpu()
                advance(len(some))
                at += size
            if processes.lacks_one_of(num_batches):
                objective.log_probabilities(model, batch)
    finally:
        model.train(training)
    found = processes.sum_of(found)
    if not found.isfinite().all():
        number = int((~found.isfinite()).any(1).nonzero()[0])
        trained = name.startswith("train")
        which = f"training row {number + 1}" if trained else f"held-out row {number + 1}"
        look = "look at it: qlora data --row" if trained else "look at it in data.eval"
        raise InputError(f"the reference's log probability of {which} is not finite; {look}")
    return found[torch.from_numpy(first[where])]
