"""A training on several cards, planned: memory of each, what is sent in a step, and the least time that takes.

    found = ways([job, job.but(together=Together(2, link=12.6e9))])

See docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from . import Plan, plan, step

ONE, DATA_PARALLEL, FSDP = "one card", "data parallel", "fsdp"
_PAYS = 1.1  # times as fast


@dataclass(frozen=True)
class Way:
    """One way to train a step. plan: its components and peak are those of one of `processes`; micro_batches: of a step, of the
    process with most. sent_bytes: by each process in a step. Seconds are of a step, at least, and None without a card;
    communication that runs beside the computation is in communication_seconds and not in step_seconds. speedup: at most, beside
    one card; None where that does not fit."""

    name: str
    processes: int
    plan: Plan
    micro_batches: int
    sent_bytes: int
    compute_seconds: float | None
    communication_seconds: float | None
    step_seconds: float | None
    tokens_per_second: float | None
    speedup: float | None = None


def ways(jobs) -> list[Way]:
    """Return the Ways of training jobs that differ in their Together: the first is alone, the others may be faster."""
    alone, *others = map(_way, jobs)
    seconds = alone.step_seconds if alone.plan.fits else None
    faster = [
        dataclasses.replace(way, speedup=seconds / way.step_seconds) if seconds and way.step_seconds else way
        for way in others
    ]
    return [dataclasses.replace(alone, speedup=seconds and 1.0), *faster]


def _way(job):
    """Return the Way of a job, without its speedup."""
    found, together = plan(job), job.together
    taken = step(job, found.checkpointed_layers)
    name = ONE if together.count == 1 else FSDP if together.shares else DATA_PARALLEL
    many = round(taken.micro_batches)
    seconds = (taken.compute_seconds, taken.communication_seconds, taken.seconds)
    return Way(name, together.count, found, many, taken.sent_bytes, *seconds, found.tokens_per_second)


def advice(found: list[Way], sharded: bool) -> str:
    """Return in a sentence or two whether several cards pay. sharded: whether the recipe has memory.sharding."""
    by_name = {way.name: way for way in found}
    data, shares = by_name[DATA_PARALLEL], by_name.get(FSDP)
    count = data.processes
    if not data.plan.fits:
        if shares is None or not shares.plan.fits:
            return (
                f"It does not fit on {count} of these cards: take more, larger ones, shorter rows or a smaller model."
            )
        first = "It fits with FSDP alone: no card holds the whole base."
        if shares.compute_seconds and shares.step_seconds and shares.step_seconds > _PAYS * shares.compute_seconds:
            slower = shares.step_seconds / shares.compute_seconds
            first += f" Sending is what takes the time: a step takes {slower:.1f} times its computing."
        return first + ("" if sharded else " Set memory.sharding=fsdp.")
    if sharded and shares is not None and shares.plan.fits:
        data = shares
    if data.speedup is None or not data.step_seconds or data.communication_seconds is None:
        return "It fits on each card. How much faster that is, is not known: one card does not hold it, or has no known speed."
    if data.speedup >= _PAYS:
        pays = f"It pays: at most {data.speedup:.2f} times as fast as accumulation on one card"
        pays += f"; sending takes {data.communication_seconds:.3g} of {data.step_seconds:.3g} s a step."
    else:
        pays = f"It does not pay: at most {data.speedup:.2f} times as fast as accumulation on one card."
    if sharded:
        pays += " The whole base fits on each card too: memory.sharding=null sends far less."
    return pays
