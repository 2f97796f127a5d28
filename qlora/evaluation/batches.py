"""Rows that go through a model together: as many as asked for, fewer once memory has run out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..system import memory
from ..system.errors import DoesNotFit
from ..system.events import note


def in_batches(compute: Callable, items: Sequence, size: int) -> int:
    """Call compute(some) for all `items` in order, `size` at a time; return how many there was memory for.

    Where it runs out, the same items go again in halves, and all later ones so many at a time.

    Raises:
        DoesNotFit: one by itself is too much.
    """
    begin = 0
    while begin < len(items):
        some, refusal = items[begin : begin + size], None
        try:
            compute(some)
        except Exception as error:
            if not memory.is_refusal(error):
                raise
            refusal = memory.refused(error)
            memory.release(error)
        if refusal is None:
            begin += len(some)
            continue
        memory.free_cached()
        if len(some) == 1:
            raise DoesNotFit(
                f"out of memory with one row at a time: {refusal}\n  free some memory, or use shorter rows or a smaller model"
            )
        size = len(some) // 2
        note(
            f"out of memory with {len(some)} rows together ({refusal}): {size} from here on, as with --batch-size {size}"
        )
    return size
