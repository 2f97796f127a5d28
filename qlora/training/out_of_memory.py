"""Out of memory: when, for which rows, and what to change."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..recipe.optimizers import DEFAULT


def too_much(trainer, measured, changes):
    """Return the message: when, for which rows, what was asked for and expected, and what to change, best first."""
    lines = [f"out of memory {measured['out_of_memory']}"]
    batch = trainer.moment.batch(trainer.objective)
    lines += [f"  {batch}"] if batch else []
    known = {"predicted": measured["predicted_bytes"], "measured in the rehearsal": trainer.rehearsed_bytes}
    peaks = [f"{word} {num_bytes / 2**30:.2f} GiB" for word, num_bytes in known.items() if num_bytes]
    lines += [f"  peak {', '.join(peaks)}"] if peaks else []
    tried = [one["change"] for one in measured.get("less_memory", ())]
    lines += [f"  tried already: {tried[-1]}"] if tried else []
    return "\n".join([*lines, "  to make it fit, cheapest first:", *(f"    {change}" for change in changes)])


def what_would_help(training, measured, on_gpu, evaluates, longest):
    """Return what can be changed for less memory, what costs least first.

    evaluates: it ran out in an evaluation, which has no backward pass. longest: tokens of the longest row, pack or batch.
    """
    number, total = measured["checkpointed_layers"], measured["layers"]
    rows, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    shorter = f"set data.max_length below {longest:,}, the longest row, and data.overlong=truncate or split"
    if evaluates:  # rows were tried one by one
        return [shorter]
    found = []
    if training.optim != DEFAULT:
        found.append(f"set training.optim={DEFAULT} (now {training.optim})")
    if number < total:
        found.append(f"set memory.gradient_checkpointing=true (now {number} of {total} layers)")
    halved = any("halves" in one["change"] for one in measured.get("less_memory", ()))
    tokens = measured.get("tokens_per_micro_batch")
    if tokens is not None and tokens > longest and not halved:
        found.append(f"set a lower memory.budget: joined micro-batches get smaller (now {tokens:,} tokens)")
    if rows > 1 and tokens is None and not halved:
        found.append(
            f"set training.per_device_train_batch_size={rows // 2} training.gradient_accumulation_steps={2 * steps} "
            f"(now {rows} and {steps})"
        )
    if training.filled_to and not halved:
        found.append(f"set a lower training.tokens_per_micro_batch (now {training.filled_to:,})")
    if on_gpu and not measured["offload"]:
        found.append("set memory.offload=true memory.gradient_checkpointing=true")
    return [*found, shorter]


@dataclass
class Moment:
    """What the trainer is about: when, in words, and with which batch. evaluates: its rows are held out."""

    when: str
    inputs: Any = None
    rows: Any = ()  # their numbers, from 0
    evaluates: bool = False

    def halves(self, objective):
        """Return the Moments of the two halves of the batch's rows."""
        parts, many = objective.halves(self.inputs), len(self.rows)
        numbers = self.rows[: many // 2], self.rows[many // 2 :]
        return [dataclasses.replace(self, inputs=part, rows=rows) for part, rows in zip(parts, numbers, strict=True)]

    def batch(self, objective):
        """Return the rows of the micro-batch in words: which, and how long; "" where there are none."""
        if self.inputs is None:
            return ""
        lengths, padded = objective.lengths(self.inputs), self.inputs.get("segments") is None
        many, width = len(lengths) > 1, max(lengths) if padded else sum(lengths)
        numbers = few([f"{number + 1:,}" for number in self.rows])
        together = f", {'padded to' if padded else 'joined to one row of'} {width:,}" if many else ""
        kind = "held-out" if self.evaluates else "training"
        row = f"row{'s' * many} {numbers}" if numbers else f"row{'s' * many}"
        return f"{kind} {row}: {few([f'{n:,}' for n in lengths])} tokens{together}"


def few(words):
    """Return the first few of them, and how many more there are."""
    return ", ".join(words[:_FEW]) + (f" and {len(words) - _FEW:,} more" if len(words) > _FEW else "")


_FEW = 8
