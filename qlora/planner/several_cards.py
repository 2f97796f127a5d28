"""A training on several cards, planned: memory of each, what is sent in a step, and the least time that takes.

    found = ways(job, job_of_shares, count=2, link=12.6e9)

Communication is bytes by the speed of the link: a lower bound, without latency. See docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from . import Job, Outline, Plan, at_tokens, micro_batch_seconds, micro_batches_a_step, plan

ONE, DATA_PARALLEL, FSDP = "one card", "data parallel", "fsdp"
NCCL_BYTES = 256 * 2**20  # buffers of its channels on each card: assumed, not measured
_LAYERS_WHOLE = (
    3  # of shares: the one at work, the next that is gathered already, and the copy that it is gathered into
)
_GATHERS = 2  # a micro-batch: forward, backward; a checkpointed layer is computed again while it is whole
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


def all_reduce_bytes(numbers, count):
    """Return the bytes that each of `count` processes sends to sum so many float32 numbers over all, around a ring."""
    return round(4 * numbers * 2 * (count - 1) / count)


def gather_bytes(code_bytes, count):
    """Return the bytes that each of `count` processes sends to give all their equal shares of `code_bytes` to all, once."""
    return round(code_bytes * (count - 1) / count)


def code_bytes(outline: Outline):
    """Return the bytes of the decoder layers' 4-bit codes."""
    return outline.work.base / 2


def held_elsewhere(codes_of_layers, count):
    """Return by how many bytes each of `count` processes holds less at its peak where they share the codes of decoder layers, of
    so many bytes each; below 0 for a model of few layers."""
    return round(sum(codes_of_layers) * (1 - 1 / count) - _LAYERS_WHOLE * max(codes_of_layers))


def held_elsewhere_of(outline: Outline, count):
    """Return the same for the layers of an Outline, which are taken to be alike."""
    return held_elsewhere([code_bytes(outline) / outline.num_layers] * outline.num_layers, count)


def ways(job: Job, shares: Job | None, count: int, link: float | None) -> list[Way]:
    """Return the Ways of training `job` on one card and on `count`, each with the budget of job.

    shares: the job with a budget of held_elsewhere_of more, for which micro-batches may be others; None: no FSDP. link: bytes a
    second that a card sends; None: no times.
    """
    alone = _way(ONE, job, 1, None)
    found = [_way(DATA_PARALLEL, job, count, link)]
    if shares is not None:
        found.append(_way(FSDP, shares, count, link))
    seconds = alone.step_seconds if alone.plan.fits else None
    faster = [
        dataclasses.replace(way, speedup=seconds / way.step_seconds) if seconds and way.step_seconds else way
        for way in found
    ]
    return [dataclasses.replace(alone, speedup=seconds and 1.0), *faster]


def _way(name, job, count, link):
    """Return the Way of a name, without its speedup. The job's budget is the card's, of shares with what is held elsewhere."""
    elsewhere = held_elsewhere_of(job.outline, count) if name == FSDP else 0
    apart = NCCL_BYTES if count > 1 else 0
    job = _shared(job, count)
    found = plan(job.but(budget_bytes=job.budget_bytes - apart))
    micro_batches = -(-round(micro_batches_a_step(job)) // count)
    seconds = micro_batch_seconds(job, found.checkpointed_layers)
    compute = None if seconds is None else micro_batches * seconds
    summed = all_reduce_bytes(float(job.outline.trained.sum()), count)
    gathered = micro_batches * _GATHERS * gather_bytes(code_bytes(job.outline), count) if name == FSDP else 0
    communication = step = rate = None
    if compute is not None and (count == 1 or link):
        first, last = (gathered / link, summed / link) if link and count > 1 else (0.0, 0.0)
        communication, step = first + last, max(compute, first) + last  # gathered while the layer before computes
        if found.tokens_per_second is not None:
            rate = found.tokens_per_second * seconds * micro_batches_a_step(job) / step
    components = dict(found.components)
    components["weights"] -= elsewhere
    components["context"] += apart
    change = apart - elsewhere
    found = dataclasses.replace(
        found,
        components=components,
        peak_bytes=found.peak_bytes + change,
        allocated_bytes=found.allocated_bytes - elsewhere,
        cuda_bytes=found.cuda_bytes - elsewhere,
        budget_bytes=job.budget_bytes - elsewhere,
        tokens_per_second=rate,
        hours=None if step is None or found.steps is None else found.steps * step / 3600,
    )
    return Way(name, count, found, micro_batches, summed + gathered, compute, communication, step, rate)


def _shared(job, count):
    """Return the job with at least `count` micro-batches a step, where the rows of a step are joined; a row is not cut."""
    many = micro_batches_a_step(job)
    if many >= count or not job.load.joins_steps:
        return job
    tokens = max(job.load.longest, -(-round(job.load.length * many) // count))
    return at_tokens(job, tokens).but(num_micro_batches=count * job.num_steps)


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
