"""What a training will cost, before it starts: memory by component, the peak and where, tokens a second at most.

    planned = plan(Job(outline(...), Load(...), training, ...))

Nothing here loads weights or needs a GPU; see docs/plan.md for what is counted and what is assumed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..recipe.optimizers import DEFAULT, OPTIMIZERS
from ..system.cards import Card
from . import speed
from .footprint import CONTEXT_BYTES, Load, NoPlan, Outline, Usage, checkpoint_bytes, outline, usage
from .together import ALONE, NETWORK, Step, Together, step_of

__all__ = ["ALONE", "CONTEXT_BYTES", "NETWORK", "Job", "Load", "NoPlan", "Plan", "Together", "at_length", "at_rows", "backwards",
           "fastest", "outline", "plan", "suggestions"]  # fmt: skip

# of a joined micro-batch. SmolLM2-135M, 32 rows of about 107 tokens a step, tokens/s and peak: 114 and 0.95 GiB one row at a
# time, 189 and 1.02 at 512 tokens, 212 and 1.29 at 1,024, 212 and 1.84 at 2,048, 210 and 3.08 at 4,096
_TOKENS_ON_CPU = 1024


@dataclass(frozen=True)
class Job:
    """All that a plan depends on.

    outline: of the model with its adapters; load, eval_load: micro-batches at their largest. training: the recipe's
    section. gradient_checkpointing: True, False, a number of layers, or "auto" (as many as the budget needs). offload:
    True, False or "auto" (where all layers checkpointed do not do). card: for the speed; None if it is not known.
    num_tokens: an epoch's, without padding; num_micro_batches: an epoch's; num_steps: an epoch's, None where each has as many
    micro-batches as the recipe says. packed_load, packed_micro_batches: those with
    data.packing, None if it cannot be. positions: tokens that a row can have at most,
    None: the model sets no limit. remade(lora, num_new_tokens, packed): another outline of the same model; what is
    not given stays. together: the processes that share each step.
    """

    outline: Outline
    load: Load
    training: Any
    budget_bytes: int
    gradient_checkpointing: Any = "auto"
    offload: Any = False
    eval_load: Load | None = None
    card: Card | None = None
    num_tokens: int | None = None
    num_micro_batches: int | None = None
    num_steps: int | None = None
    packed_load: Load | None = None
    packed_micro_batches: int | None = None
    lora: Any = None
    num_new_tokens: int = 0
    positions: int | None = None
    remade: Callable | None = None
    together: Together = ALONE

    def but(self, **changes):
        """Return the job with these fields changed; fields of `training` by their own names."""
        training = {name: changes.pop(name) for name in list(changes) if name in type(self.training).model_fields}
        if training:
            changes["training"] = self.training.model_copy(update=training)
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Plan:
    """Of one process; tokens_per_second is of all. components: bytes by name at the moment of the peak, which sum to peak_bytes;
    where: that moment. host_bytes: beside that, for what is moved to the host; allocated_bytes: of the peak without a GPU's
    context; cuda_bytes: those that torch's counters on a GPU see. tokens_per_micro_batch: at most, where the rows of a step are
    joined. tokens_per_second: at most, padding not counted; steps and hours: of the whole training, at that speed;
    checkpoint_bytes: of one on the disk. counts: what tokens_per_second is a number of, tokens or images. Numbers that are not
    known are None."""

    components: dict
    peak_bytes: int
    where: str
    budget_bytes: int
    fits: bool
    checkpointed_layers: int
    num_layers: int
    offload: bool
    host_bytes: int
    allocated_bytes: int
    cuda_bytes: int
    tokens_per_micro_batch: int | None
    tokens_per_second: float | None
    steps: int | None
    hours: float | None
    checkpoint_bytes: int
    counts: str


def plan(job: Job) -> Plan:
    """Return the Plan of `job`, with as few layers checkpointed as it lets be; some milliseconds."""
    layers, offload, found = _choice(job)
    seconds = step(job, layers).seconds
    steps = _steps(job)
    per_second = hours = None
    if seconds is not None:
        real = job.load.tokens
        if job.num_tokens and job.num_micro_batches:
            real = min(real, job.num_tokens / job.num_micro_batches)
        per_second = real * micro_batches_a_step(job) / seconds
        if steps is not None:
            hours = steps * seconds / 3600
    return Plan(
        found.components,
        found.peak_bytes,
        found.where,
        job.budget_bytes,
        found.peak_bytes <= job.budget_bytes,
        layers,
        job.outline.num_layers,
        offload,
        found.host_bytes,
        found.allocated_bytes,
        found.allocated_bytes - found.paged_bytes,
        job.load.length if job.load.joins_steps else None,
        per_second,
        steps,
        hours,
        checkpoint_bytes(job.outline, job.training.optim),
        job.outline.counts,
    )


def fastest(jobs) -> Job:
    """Return the job whose micro-batches are fastest where they fit: of those within 2 % of that, the smallest.

    jobs: the same but for their micro-batches, the smallest first. That is the answer where none fits. Without a card, which
    is on a CPU: the largest up to 1,024 tokens that needs as few layers checkpointed as any.
    """
    plans = [(job, plan(job)) for job in jobs if job.card or job.load.tokens <= _TOKENS_ON_CPU] or [
        (jobs[0], plan(jobs[0]))
    ]
    fitting = [(job, found) for job, found in plans if found.fits]
    fitting = [(job, found) for job, found in fitting if not found.offload] or fitting
    if not fitting:
        return jobs[0]
    if jobs[0].card is None:
        fewest = min(found.checkpointed_layers for _, found in fitting)
        return [job for job, found in fitting if found.checkpointed_layers == fewest][-1]
    best = max(found.tokens_per_second or 0.0 for _, found in fitting)
    return next(job for job, found in fitting if (found.tokens_per_second or 0.0) >= 0.98 * best)


def _choice(job) -> tuple[int, bool, Usage]:
    """Return (checkpointed layers, offload, Usage)."""
    setting, num = job.gradient_checkpointing, job.outline.num_layers

    def at(layers, offload=False):
        return layers, offload, usage(job.outline, job.load, job.training, layers, offload, job.eval_load, job.together)

    def fits(choice):
        return choice[2].peak_bytes <= job.budget_bytes

    if setting is not True and setting != "auto":
        return at(int(setting), job.offload is True)
    everything = at(num, job.offload is True)
    if setting is True or job.offload is True or not fits(everything):
        return at(num, True) if job.offload == "auto" and not fits(everything) else everything
    low, high, best = 0, num, everything  # bisection: the peak falls with every layer
    while low < high:
        middle = (low + high) // 2
        tried = at(middle)
        if fits(tried):
            high, best = middle, tried
        else:
            low = middle + 1
    return best


def step(job, layers) -> Step:
    """Return the Step of the process with most micro-batches, where so many layers are checkpointed."""
    return step_of(job.together, job.outline, micro_batches_a_step(job), _micro_batch_seconds(job, layers))


def _micro_batch_seconds(job, layers):
    """Return the least seconds of computing a mean micro-batch, None without a card."""
    if job.card is None:
        return None
    load, share = job.load, 1.0
    if job.num_tokens and job.num_micro_batches and load.joined:  # padded rows are computed at full length
        share = min(1.0, job.num_tokens / job.num_micro_batches / load.tokens)
    work = job.outline.work
    length, scored = round(load.length * share), round(load.scored * share)
    recomputed = layers / job.outline.num_layers
    return speed.seconds(work, job.card, load.rows, length, scored, recomputed, load.attended)


def micro_batches_a_step(job):
    """Return how many micro-batches a step has, in the mean."""
    if job.num_steps is None:
        return job.training.gradient_accumulation_steps
    return job.num_micro_batches / job.num_steps


def _steps(job):
    if job.training.max_steps is not None:
        return job.training.max_steps
    if job.num_micro_batches is None or job.num_tokens is None:
        return None
    an_epoch = job.num_steps or -(-job.num_micro_batches // job.training.gradient_accumulation_steps)
    return math.ceil(an_epoch * job.training.num_train_epochs)  # as transformers has it


# ---- backwards -------------------------------------------------------------------------------------------------------


def backwards(job: Job) -> dict:
    """Return {"max_length", "micro_batch", "r"}: the largest of each that fits, all else as it is; 0 for none.

    Where the rows of a step are joined, "tokens_per_micro_batch" is there instead of "micro_batch", which is in rows; of images
    there is no max_length. max_length is never above the model's positions.
    """
    answers = {}
    if job.outline.counts == "tokens":
        answers["max_length"] = _largest(lambda length: at_length(job, length), job.positions or _MOST)
    if job.load.joins_steps:
        answers["tokens_per_micro_batch"] = _largest(lambda tokens: at_tokens(job, tokens))
    else:
        answers["micro_batch"] = _largest(lambda rows: at_rows(job, rows))
    ranks = _ranks(job)
    if ranks is not None:
        answers["r"] = _largest(ranks, limit=4096)
    return answers


def at_length(job, length):
    """Return the job with its longest row, or packs, of this length and the others in proportion.

    Where the rows of a step are joined, one row of this length is the smallest micro-batch that there can be.
    """
    load = job.load
    if load.joins_steps:
        return at_tokens(job, 2 * length if load.pairs else length, length)
    factor = length / load.longest
    document = None if load.document is None else max(1, round(load.document * factor))
    scaled = dataclasses.replace(load, length=max(1, round(load.length * factor)), document=document)
    return job.but(load=dataclasses.replace(scaled, scored=_scaled(load, factor)))


def at_rows(job, rows):
    """Return the job with this many rows a micro-batch."""
    load = job.load
    return job.but(load=dataclasses.replace(load, rows=rows, scored=_scaled(load, rows / load.rows)))


def at_tokens(job, tokens, longest=None):
    """Return the job with joined micro-batches of this many tokens at most, and with this longest row."""
    load = job.load
    document = longest or min(load.document or tokens, tokens)
    attended = load.attended and load.attended * document / (load.document or document)
    scored = _scaled(load, tokens / load.length)
    return job.but(
        load=dataclasses.replace(load, length=tokens, document=document, attended=attended, scored=scored, alone=False)
    )


def _scaled(load, factor):
    return max(1, round(load.scored * factor))


def _ranks(job):
    """Return rank -> Job, from two outlines and what lies on the line through them; None where the rank is not one number."""
    lora = job.lora
    if job.remade is None or getattr(lora, "r", None) is None or getattr(lora, "rank_pattern", None):
        return None
    other = job.remade(lora=lora.model_copy(update={"r": 2 * lora.r}))
    return lambda rank: job.but(outline=job.outline.blend(other, (rank - lora.r) / lora.r))


_MOST = 2**22


def _largest(job_of, limit=_MOST):
    """Return the largest n up to `limit` for which the plan of job_of(n) fits, 0 for none; as if what fits once fits below."""

    def fits(n):
        return plan(job_of(n)).fits

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- suggestions -----------------------------------------------------------------------------------------------------


def suggestions(job: Job) -> list:
    """Return changes that make the job fit, or faster: [{"set", "peak_bytes", "fits", "tokens_per_second"}], best first.

    Best is what fits, then what is fastest, then what needs least. "set" is what to put on the command line.
    """
    now = plan(job)
    found = []
    for change, changed in _changes(job, now):
        then = plan(changed)
        faster = (then.tokens_per_second or 0) > 1.02 * (now.tokens_per_second or 0)
        if (then.fits and (not now.fits or faster)) or (not now.fits and then.peak_bytes < 0.98 * now.peak_bytes):
            found.append({"set": change, "peak_bytes": then.peak_bytes, "fits": then.fits,
                          "tokens_per_second": then.tokens_per_second})  # fmt: skip
    found.sort(key=lambda one: (not one["fits"], -(one["tokens_per_second"] or 0), one["peak_bytes"]))
    return found[:_SUGGESTED]


_SUGGESTED = 6


def _changes(job, now):
    """Yield (what to set, Job)."""
    load, training = job.load, job.training
    rows, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if job.packed_load is not None and not load.packed and not training.group_by_length:
        packed = job.remade(packed=True) if job.remade else job.outline
        changes = {"num_micro_batches": job.packed_micro_batches, "num_steps": None}
        changed = job.but(outline=packed, load=job.packed_load, **changes)
        single = " training.per_device_train_batch_size=1" if rows > 1 else ""
        yield f"data.packing=true{single}", changed.but(per_device_train_batch_size=1)
    if job.gradient_checkpointing is not True and not now.fits:
        yield "memory.gradient_checkpointing=true", job.but(gradient_checkpointing=True)
    if job.gradient_checkpointing != "auto" and (job.gradient_checkpointing is True or not now.fits):
        yield "memory.gradient_checkpointing=auto", job.but(gradient_checkpointing="auto")
    if not now.offload and not now.fits:
        settings = "memory.gradient_checkpointing=true memory.offload=true"
        yield settings, job.but(gradient_checkpointing=True, offload=True)
    if OPTIMIZERS[training.optim].bits > OPTIMIZERS[DEFAULT].bits:
        yield f"training.optim={DEFAULT}", job.but(optim=DEFAULT)
    for other in sorted({rows // 2, 1, 2 * rows, 4 * rows} - {0, rows}):
        if load.joins_steps or load.rows != rows or load.packed or rows * accumulation % other:
            continue  # the rows of a step stay as many
        changes = {
            "per_device_train_batch_size": other,
            "gradient_accumulation_steps": rows * accumulation // other,
        }
        batches = job.num_micro_batches and -(-job.num_micro_batches * rows // other)
        yield (
            " ".join(f"training.{name}={value}" for name, value in changes.items()),
            at_rows(job, other).but(num_micro_batches=batches, **changes),
        )
    if not now.fits:
        yield from _smaller(job)


def _smaller(job):
    """Yield changes that give something up, for a job that does not fit."""
    load, lora = job.load, job.lora
    length = _largest(lambda n: at_length(job, n)) // 64 * 64 if job.outline.counts == "tokens" else 0
    if 0 < length < load.longest:
        yield f"data.max_length={length}", at_length(job, length).but(num_tokens=None)
    ranks = _ranks(job)
    if ranks is not None:
        rank = _largest(ranks, limit=lora.r - 1) if lora.r > 1 else 0
        rank = 2 ** (rank.bit_length() - 1) if rank else min(8, lora.r // 2)
        if rank:
            yield f"{lora.key}.r={rank}", ranks(rank)
    if job.remade is None or lora is None:
        return
    for field, value in (("use_dora", False), ("lora_dropout", 0.0), ("modules_to_save", None)):
        if getattr(lora, field, None):
            said = "null" if value is None else str(value).lower()
            yield f"{lora.key}.{field}={said}", job.but(outline=job.remade(lora=lora.model_copy(update={field: value})))
    if job.num_new_tokens:
        yield "model.new_tokens=null", job.but(outline=job.remade(num_new_tokens=0))
