"""What training is to cost on this machine, before it starts: memory and disk, or a refusal that says what would fit."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from ... import planner
from ...runs.checkpoints import Checkpoints
from ...runs.folder import RunDir
from ...system import memory
from ...system.errors import DoesNotFit, InputError
from ...system.storage import free_disk_bytes
from ...system.units import size
from .plan_job import budget_of_device, held_by_others, job_of, refuse_layers


@dataclass(frozen=True)
class Planned:
    """How the layers are checkpointed, and the peak that is expected, in bytes, in the terms of memory.Peak.

    limit_bytes: what there is, in the same terms. Without a plan, which is None then, why_none says why, these are None, and the
    rehearsal finds what does not fit.
    tokens_before: the tokens_per_micro_batch of a resumed run, where the memory no longer allows them.
    sharers: processes that share what is free.
    """

    checkpointed_layers: int
    offload: bool
    predicted_bytes: int | None
    plan: planner.Plan | None = None
    why_none: str = ""
    tokens_before: int | None = None
    limit_bytes: int | None = None
    sharers: int = 1

    @property
    def components(self):
        """What predicted_bytes is made of: {component: bytes}; "process" is what was held before. Empty without a plan."""
        if self.plan is None or self.predicted_bytes is None:
            return {}
        components = self.plan.components
        before = self.predicted_bytes - self.plan.peak_bytes
        if before >= 0:
            return {"process": before} | components
        found = {name: num_bytes for name, num_bytes in components.items() if name != "context"}
        found["optimizer"] -= self.plan.allocated_bytes - self.plan.cuda_bytes  # paged states are not torch's
        return found

    @property
    def tokens_per_micro_batch(self):
        return None if self.plan is None else self.plan.tokens_per_micro_batch


def plan_training(prepared, device, tokens=None, together=planner.ALONE, here=1) -> Planned:
    """Return how the training of Prepared data fits on a device, which may be a CPU.

    tokens: the tokens_per_micro_batch of a run that is resumed; other micro-batches would be the same but for rounding.
    together: the planner.Together of which this is one process; here: how many of them are on this machine.

    Raises:
        DoesNotFit: it does not, or what it offloads does not fit into the host's memory; says what would.
        InputError: the model has fewer layers than are to be checkpointed, offloading has nothing to move, or the disk is full.
    """
    recipe, budget = prepared.recipe, budget_of_device(prepared.recipe, device, here)
    sharers = here if device.type != "cuda" and recipe.memory.budget is None else 1
    try:
        job = job_of(prepared, device.type, budget, tokens, together)
    except planner.NoPlan as error:
        num_layers = getattr(prepared.config.get_text_config(), "num_hidden_layers", 0)
        refuse_layers(recipe.memory, num_layers)
        setting = recipe.memory.gradient_checkpointing
        setting = device.type == "cuda" if setting == "auto" else setting
        layers = num_layers * setting if isinstance(setting, bool) else setting
        return Planned(layers, recipe.memory.offload is True, None, why_none=str(error))
    found = planner.plan(job)
    before = None
    if tokens is not None and not found.fits:
        before, job = tokens, job_of(prepared, device.type, budget, together=together)
        found = planner.plan(job)
    if not found.fits:
        raise DoesNotFit(_what_would_fit(recipe, job, found, device, sharers))
    refuse_full_host(found, here, together.offload)
    refuse_full_disk(recipe, found)
    predicted = memory.anonymous_bytes() + found.peak_bytes if device.type == "cpu" else found.cuda_bytes
    limit = predicted - found.peak_bytes + found.budget_bytes  # on a GPU less what is not torch's
    return Planned(found.checkpointed_layers, found.offload, predicted, found, "", before, limit, sharers)


def _what_would_fit(recipe, job, found, device, sharers):
    free = recipe.memory.budget is None
    changes = planner.suggestions(job)
    lines = [
        f"does not fit: {size(found.peak_bytes)} are needed ({found.where}), {size(job.budget_bytes)} are "
        f"{'free' if free else 'memory.budget'}{for_each_of(sharers)}; "
        + ("what would help, best first:" if changes else "no setting would make it less, a smaller model would")
    ]
    lines += [
        f"  {change['set']}: {size(change['peak_bytes'])}{', fits' if change['fits'] else ''}" for change in changes
    ]
    others = held_by_others(device)
    if free and others:
        lines.append(f"  other processes hold {size(others)} of the GPU; nvidia-smi lists them")
    return "\n".join(lines)


def for_each_of(sharers):
    """Return in words that a number of bytes is the share of each of so many processes."""
    return f" for each of {sharers} processes" if sharers > 1 else ""


def refuse_full_host(found, here=1, of_codes=False):
    """Raise DoesNotFit where what the Plan of `here` processes moves to the host does not fit into the memory that is free there:
    it is pinned, and cannot be swapped. of_codes: the base's codes are part of it."""
    free, needed = psutil.virtual_memory().available, here * found.host_bytes
    if needed > free and of_codes:
        raise DoesNotFit(
            f"does not fit: memory.sharding: fsdp_offload needs {size(needed)} of CPU memory for the {here} processes of this "
            f"machine, {size(free)} are free there; free some, or set memory.sharding=fsdp"
        )
    if needed > free:
        of_all = f" of {here} processes" if here > 1 else ""
        raise DoesNotFit(
            f"does not fit: memory.offload moves {size(needed)} of layer inputs{of_all} to CPU memory, {size(free)} are free "
            "there; free some, set a lower data.max_length, or fewer tokens a micro-batch (training.per_device_train_batch_size, "
            "training.tokens_per_micro_batch)"
        )


def refuse_full_disk(recipe, found):
    """Raise InputError where the disk has no room for the checkpoints that will be there at a time, and the adapter."""
    training, run = recipe.training, RunDir(recipe.output_dir)
    every = [training.save_steps, training.eval_steps if training.looks_for_best else None]
    every, count = [steps for steps in every if steps is not None], 0
    if every:
        saves = None if found.steps is None else sum(-(-found.steps // steps) for steps in every)
        limit = training.save_total_limit
        # the new one comes first, and each may know of another best
        limit = None if limit is None else limit * (2 if training.looks_for_best else 1) + 1
        count = min((number for number in (saves, limit) if number is not None), default=1)
    there = Checkpoints(run.checkpoints, None).num_bytes()
    needed = max(0, count * found.checkpoint_bytes - there) + found.components["adapter"]
    free = free_disk_bytes(run.path)
    if needed > free:
        fewer = ", set a lower training.save_total_limit or higher training.save_steps" if count > 1 else ""
        raise InputError(
            f"output_dir {run.path}: {count} checkpoints of {size(found.checkpoint_bytes)} and the adapter need "
            f"{needed:,} bytes more, {free:,} are free; free some{fewer}, or set output_dir=ANOTHER_FOLDER"
        )
