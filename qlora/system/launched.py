"""Processes that a launcher (torchrun, accelerate, mpirun, srun) has started together: not supported, so refused by name."""

from __future__ import annotations

import contextlib
import os

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


def refuse_several(command):
    """Raise InputError in one of several processes. command: what to start instead, such as "qlora train RECIPE"."""
    found = several()
    if found is not None:
        raise InputError(
            f"several processes are not supported yet ({found}); start one, without torchrun, accelerate launch, mpirun or "
            f"srun -n: {command}\n  if it is one already, unset {found.partition('=')[0]}"
        )


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
