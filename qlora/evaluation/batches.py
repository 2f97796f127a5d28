"""Rows that go through a model together: as many as asked for, fewer once memory has run out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..system import memory
from ..system.errors import DoesNotFit
from ..system.events import note


def room_for(model, num_tokens: int) -> int | None:
    """Return how many rows of `num_tokens`, prompt and answer, fit on a CPU by the keys and values that a model keeps, in half
    of the memory that is free; at least 1. None on a GPU, which refuses what does not fit where a CPU's system ends the process;
    and for a model without attention."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if model.device.type != "cpu" or not heads:
        return None
    heads_of_keys = getattr(config, "num_key_value_heads", None) or heads
    width = heads_of_keys * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    of_token = 2 * config.num_hidden_layers * width * model.dtype.itemsize
    return max(1, memory.available_bytes(model.device) // 2 // (num_tokens * of_token))


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
