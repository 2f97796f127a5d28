"""Processes that a launcher (torchrun, accelerate, mpirun, srun) has started together: for a training; else refused by name."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from .errors import InputError

# How many processes there are. torchrun and accelerate; what accelerate 1.15 reads beside it; a step of srun: SLURM_NTASKS is
# set in every batch script too, where there may be one process.
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
# With any of these accelerate makes a process group for one process too, and wraps the model for several.
_READ_BY_ACCELERATE = (*COUNTS[:-1], "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_RANK",
                       "MV2_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK",
                       "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # fmt: skip


def several() -> str | None:
    """Return the variable that says that this is one of several processes, as "NAME=VALUE"; None if it is alone."""
    for name in COUNTS:
        value = os.environ.get(name, "").strip()
        if value.isascii() and value.isdigit() and int(value) > 1:
            return f"{name}={value}"
    return None


def is_first() -> bool:
    """Return whether this is the process that speaks for all: alone, or of rank 0."""
    return several() is None or os.environ.get("RANK", "").strip() in ("", "0")


def refuse_several(command):
    """Raise InputError in one of several processes. command: what to start instead, such as "qlora train RECIPE"."""
    found = several()
    if found is not None:
        raise InputError(
            f"only qlora train runs in several processes ({found}); start one, without torchrun, accelerate launch, mpirun or "
            f"srun -n: {command}\n  if it is one already, unset {found.partition('=')[0]}"
        )


@dataclass(frozen=True)
class Launched:
    """This process, as its launcher says. here: the processes of this machine; local_rank: which of these it is."""

    rank: int
    count: int
    local_rank: int
    here: int


def to_train() -> Launched | None:
    """Return which of several processes of a training this is; None if it is alone.

    Raises:
        InputError: the launcher is not torchrun or accelerate launch, or shards the model.
    """
    found = several()
    if found is None:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name, "").strip()]
    if missing:
        raise InputError(
            f"one of several processes ({found}), but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; start "
            "them with torchrun or accelerate launch, which set it: torchrun --nproc_per_node N -m qlora train RECIPE\n"
            f"  if it is one already, unset {found.partition('=')[0]}"
        )
    for name, what in (("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1", "yes", "on"):
            raise InputError(
                f"{what} is not supported: each process has the whole model; leave it out of accelerate's settings"
                + ("; for shares of the base set memory.sharding=fsdp" if what == "FSDP" else "")
            )
    try:
        rank, count, local_rank, here = (int(os.environ[name]) for name in names[:4])
    except ValueError as error:
        raise InputError(f"{', '.join(names[:4])}: {error}; torchrun and accelerate launch set them") from None
    return Launched(rank, count, local_rank, here)


@contextlib.contextmanager
def alone():
    """Hide from accelerate in the block what a launcher has set for its one process, or what another program left behind."""
    hidden = {name: os.environ.pop(name) for name in [*os.environ] if _is_read(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is_read(name):
    return name in _READ_BY_ACCELERATE or name.startswith(("ACCELERATE_", "FSDP_"))
