"""What export writes with --int8: the merged model in dynamic int8 for CPUs, made of the folder that was just proven."""

from __future__ import annotations

import dataclasses

from ... import base_model
from ...exporter import int8
from ...recipe import parse_size
from ...system.errors import InputError
from ...system.events import note, progress
from ...system.units import size
from ..opening.chosen_task import refuse_classes


def num_bytes(plan):
    """Return what the folder takes on the disk, at most: a byte a number in int8, four for others."""
    vocab_size = plan.config.get_text_config().vocab_size  # embedding and head stay as they are
    stays = [len(spec.shape) < 2 or spec.shape[0] == vocab_size for spec in plan.specs]
    numbers = [spec.num_bytes // spec.dtype.itemsize for spec in plan.specs]
    return sum(count * (4 if whole else 1) for count, whole in zip(numbers, stays, strict=True))


def refuse(trained, plan, unused):
    """Raise InputError before the export where it cannot be written in int8.

    unused: {option: whether it was given}, of those that go with a model in full precision only.
    """
    refuse_classes(trained.checkpoint.task.file, "--int8")
    given = [name for name, there in unused.items() if there]
    if given:
        raise InputError(f"--int8 writes no model in full precision, which {', '.join(given)} needs; export twice")
    folder = trained.checkpoint.folder
    if plan.kept:
        raise InputError(f"{folder}: a multimodal checkpoint, which --int8 does not take; leave it out")
    other = sorted(plan.copied) or [spec.name for spec in plan.specs if len(spec.shape) > 2]
    if other:
        raise InputError(
            f"{folder}: {len(other)} tensors such as {other[0]} are experts or kernels, no linear layers that torchao quantizes; "
            "leave --int8 out"
        )
    if plan.conv1d:
        raise InputError(
            f"{folder}: {len(plan.conv1d)} of its layers are Conv1D, which torchao does not quantize; leave --int8 out"
        )
    int8.refuse_without_torchao()


def add_int8(trained, merged, folder, prover, report) -> dict:
    """Write the model in folder `merged` in int8 into `folder`; return what changes in its report, which has the proof.

    prover: has proven `merged`; None where nothing is to be proven.

    Raises:
        ProofFailed: a weight that was read back is not the merged one.
    """
    dtype = int8.dtype_beside(trained.export.dtype)
    with progress("writing int8"):
        max_bytes = parse_size(trained.export.max_shard_size)
        count = int8.write(merged, folder, dtype, max_bytes, trained.model.trust_remote_code)
    weights = {folder / name for name in base_model.weight_files(folder).values()}
    stored = sum(path.stat().st_size for path in weights)
    found = {"layers": count, "dtype_beside": dtype, "bytes": stored}
    note(f"int8      {count} linear layers in int8, the rest in {dtype}: {size(stored)}; each weight read back")
    if prover is None:
        return {"int8": found, "bytes": stored}
    scores, failures = prover.compare_int8(folder)
    found |= dataclasses.asdict(scores) | {"limits": {"kl": int8.KL_LIMIT}}
    failures = [*report["failures"], *failures]
    return {"int8": found, "bytes": stored, "failures": failures, "verified": not failures}
