"""Tensors a group at a time, for torch._foreach: on a GPU one launch a group instead of one a tensor."""

from __future__ import annotations

NUMBERS = 2**22  # 16 MiB of float32 in a group: ten groups for r = 16 on 7B, whose tensors are 448
SENT = 2**24  # numbers that are sent to another process at a time: 64 MiB of float32


def of(sizes, on_gpu, most=None):
    """Return slices of a list of tensors with `sizes` numbers each, `most` (None: NUMBERS) in a slice or one tensor: a tensor a
    slice on a CPU, where a launch costs nothing and two copies at a time memory."""
    most = NUMBERS if most is None else most
    slices, start, total = [], 0, 0
    for at, size in enumerate(sizes):
        if at > start and (not on_gpu or total + size > most):
            slices.append(slice(start, at))
            start, total = at, 0
        total += size
    return [*slices, slice(start, len(sizes))] if len(sizes) else []
