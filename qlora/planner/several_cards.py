"""A training on several cards, planned: memory of each, what is sent in a step, and the least time that takes.

    found = ways([job, job.but(together=Together(2, link=12.6e9))])

See docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..system.units import size
from . import Plan, plan, step

ONE, DATA_PARALLEL, FSDP, FSDP_OFFLOAD = "one card", "data parallel", "fsdp", "fsdp_offload"  # as memory.sharding says
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
    alone, *others = map(way, jobs)
    seconds = alone.step_seconds if alone.plan.fits else None
    faster = [
        dataclasses.replace(one, speedup=seconds / one.step_seconds) if seconds and one.step_seconds else one
        for one in others
    ]
    return [dataclasses.replace(alone, speedup=seconds and 1.0), *faster]


def way(job) -> Way:
    """Return the Way of a job, without its speedup."""
    found, together = plan(job), job.together
    taken = step(job, found.checkpointed_layers)
    name = ONE if together.count == 1 else DATA_PARALLEL
    if together.shares:
        name = FSDP_OFFLOAD if together.offload else FSDP
    many = round(taken.micro_batches)
    seconds = (taken.compute_seconds, taken.communication_seconds, taken.seconds)
    return Way(name, together.count, found, many, taken.sent_bytes, *seconds, found.tokens_per_second)


def advice(found: list[Way], sharding: str | None, more: Way | None = None) -> str:
    """Return in a sentence or two whether several cards pay. sharding: memory.sharding of the recipe. more: where none fits, that
    of the fewest cards which does; None: none does."""
    by_name = {way.name: way for way in found}
    data, in_shares = by_name[DATA_PARALLEL], [by_name[name] for name in (FSDP, FSDP_OFFLOAD) if name in by_name]
    fitting = [way for way in in_shares if way.plan.fits]
    if not data.plan.fits:
        return _of_shares(fitting, sharding) if fitting else _too_few(data.processes, in_shares, more)
    if fitting and sharding is not None:
        data = next((way for way in fitting if way.name == sharding), fitting[0])
    if data.speedup is None or not data.step_seconds or data.communication_seconds is None:
        return "It fits on each card. How much faster that is, is not known: one card does not hold it, or has no known speed."
    if data.speedup >= _PAYS:
        pays = f"It pays: at most {data.speedup:.2f} times as fast as accumulation on one card"
        pays += f"; sending takes {data.communication_seconds:.3g} of {data.step_seconds:.3g} s a step."
    else:
        pays = f"It does not pay: at most {data.speedup:.2f} times as fast as accumulation on one card."
    if sharding is not None:
        pays += " The whole base fits on each card too: memory.sharding=null sends far less."
    return pays


def _of_shares(fitting, sharding):
    """Say that these ways fit alone, in shares, the first without offloading if that is one of them."""
    best = fitting[0]
    said = f"It fits with memory.sharding={best.name} alone: no card holds the whole base"
    if best.name == FSDP_OFFLOAD:
        said += f", nor its share beside the rest. Each process needs {size(best.plan.host_bytes)} of CPU memory"
    said += "."
    if best.compute_seconds and best.step_seconds and best.step_seconds > _PAYS * best.compute_seconds:
        slower = best.step_seconds / best.compute_seconds
        said += f" Sending is what takes the time: a step takes {slower:.1f} times its computing."
    return said + ("" if sharding == best.name else f" Set memory.sharding={best.name}.")


def _too_few(count, in_shares, more):
    said = f"It does not fit on {count} of these cards."
    if more is not None:
        return f"{said} {more.processes} would do: --processes {more.processes} memory.sharding={more.name}."
    if not in_shares:
        return f"{said} memory.sharding does not share such a training: take larger cards, shorter rows or a smaller model."
    return f"{said} Nor on more of them that the batch divides by: take larger ones, shorter rows or a smaller model."
