"""A recipe and its data as a planner.Job, and the memory that there is for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import base_model, data, kernels, planner
from ...data import Batches, Packs
from ...kernels import attention
from ...recipe import parse_size
from ...system import cards, memory
from ...system.errors import InputError
from ..opening.chosen_task import encoder_of, task_of
from .joined_steps import attended, joined_steps

_USUAL_CARD = "4090"
_OF_A_DESKTOP = 2**30  # bytes of a GPU


@dataclass(frozen=True)
class Budget:
    """Memory to plan for, in bytes. why: a few words on where that number is from. card: planner.Card, for the speed. kind: of
    the device, "cuda" or "cpu"."""

    num_bytes: int
    why: str = ""
    card: Any = None
    kind: str = "cuda"


def budget_of(recipe, vram=None, card=None) -> Budget:
    """Return the Budget of a GPU: by `vram` or `card` as text, by the recipe, or by the GPU of this machine; of this machine's
    CPU where `card` is "cpu".

    Raises:
        InputError: a size or a card is wrong.
    """
    import torch

    kind = "cpu" if is_cpu(card) else "cuda"
    chosen = None if card is None or kind == "cpu" else cards.card_of(card)
    if torch.cuda.is_available() and card is None:
        chosen = card_of_device(torch.device("cuda"))
    for name, text in (("--vram", vram), ("memory.budget", recipe.memory.budget)):
        if text is not None:
            try:
                return Budget(parse_size(text), name, chosen, kind)
            except ValueError as error:
                raise InputError(f"{name} {text!r}: {error}") from None
    if kind == "cpu":
        return Budget(free_bytes(torch.device("cpu")), "free memory of this machine, without a GPU", None, kind)
    if card is not None and chosen is not None:
        return Budget(chosen.memory, chosen.name, chosen)
    if torch.cuda.is_available():
        return Budget(free_bytes(torch.device("cuda")), torch.cuda.get_device_name(), chosen)
    why = "no GPU found, so an RTX 4090 is assumed: --card and --vram say another, --card cpu trains on this machine's processor"
    usual = cards.card_of(_USUAL_CARD)
    return Budget(usual.memory, why, usual)


def computer_of(card):
    """Return the base_model.Computer to plan for: `card`, as text; None: the GPU of this machine, or one with bfloat16."""
    import torch

    if is_cpu(card):
        return base_model.computer(torch.device("cpu"))
    if card is None and torch.cuda.is_available():
        return base_model.computer(torch.device("cuda"))
    found = cards.card_of(card or _USUAL_CARD)
    return base_model.Computer(found.name, found.bfloat16)


def is_cpu(card):
    """Return whether `card`, as text, means this machine's processor."""
    return card is not None and str(card).lower() == "cpu"


def budget_of_device(recipe, device, sharers=1) -> Budget:
    """Return the Budget of a training on a torch device: memory.budget, or what is free there; on a CPU, whose memory so many
    processes share, its part of that."""
    import torch

    budget, card = recipe.memory.budget, None
    if device.type == "cuda" and torch.cuda.is_available():
        card = card_of_device(device)
    free = free_bytes(device) // (1 if device.type == "cuda" else sharers)
    return Budget(free if budget is None else parse_size(budget), card=card, kind=device.type)


def card_of_device(device):
    """Return the planner.Card that a GPU is, None if it is not known."""
    import torch

    return cards.find(torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1])


def free_bytes(device):
    """Return the bytes that this process may take on a device, its own CUDA context included, which a plan counts."""
    import torch

    if device.type != "cuda":
        return memory.available_bytes(device)
    free, total = torch.cuda.mem_get_info(device)
    return min(total, free + planner.CONTEXT_BYTES)


def held_by_others(device):
    """Return the bytes of a GPU that other processes hold, where it is more than a desktop takes; else 0, and on a CPU."""
    import torch

    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    held = total - free - planner.CONTEXT_BYTES
    return held if held > _OF_A_DESKTOP else 0


def job_of(prepared, device_kind, budget: Budget, tokens=None, together=planner.ALONE, remade=None):
    """Return the planner.Job of Prepared data. device_kind: "cuda" or "cpu".

    tokens: of a micro-batch that the rows of a step are joined into, at most; None, or where a row is longer: as many as are
    fastest. together: the planner.Together of which it is one process. remade: of another Job of the same recipe,
    so that the model is not traced again.

    Raises:
        InputError: see with_outline.
        planner.NoPlan: the model cannot be planned.
    """
    recipe, training = prepared.recipe, prepared.recipe.training
    examples, batches, held_out = prepared.examples, prepared.batches, prepared.eval_examples
    remade = remade or _outlines(recipe, prepared.config, len(prepared.checkpoint.new_tokens), device_kind)
    joins = remade().joins
    rows = training.per_device_train_batch_size
    numbers = {"num_tokens": int(examples.lengths.sum()), "num_micro_batches": -(-len(batches) // rows)}
    steps = None
    if isinstance(batches, Packs):
        load = _packed_load(batches, examples, rows)
    else:
        is_joined = isinstance(batches, Batches)
        load = _load_of_batches(batches, examples, joins) if is_joined else _load(examples, rows, joins, device_kind)
        if training.joins_steps and joins:
            sequences = examples.longest if examples.are_pairs else None
            lengths, parts = (examples.lengths, examples.num_trained), together.count
            steps = joined_steps(*lengths, training.rows_per_step, tokens, sequences, parts)
        may_pack = not (prepared.checkpoint.task.file.HAS_CLASSES or examples.are_pairs or examples.are_unpaired)
        if may_pack and attention.why_not(prepared.config, recipe.data.max_length) is None:
            packs = data.pack(examples, training.filled_to or recipe.data.max_length)
            numbers |= {"packed_load": _packed_load(packs, examples, 1), "packed_micro_batches": len(packs)}
    if len(held_out):
        numbers["eval_load"] = _load(held_out, training.per_device_eval_batch_size, joins or load.packed, device_kind)
    numbers |= {"budget_bytes": budget.num_bytes, "card": budget.card, "together": together}
    numbers["positions"] = _positions(recipe, prepared.config)
    job = with_outline(recipe, remade, load=load, **numbers)
    return job if steps is None else _fastest(job, steps)


def _positions(recipe, config):
    """Return how many tokens a row can have beside the method's virtual tokens; None where the model sets no limit."""
    limit = base_model.num_positions(config)
    return None if limit is None else limit - recipe.method.num_positions


def _fastest(job, steps):
    """Return `job` with the one of JoinedSteps `steps` that is fastest."""
    # in proportion all cards are alike
    card, together = (
        job.card or (cards.card_of(_USUAL_CARD) if job.outline.device_kind == "cuda" else None),
        job.together,
    )
    if card is not None and together.link is None:
        together = dataclasses.replace(together, link=card.link_bandwidth)
    if card is not None:
        together = dataclasses.replace(together, host_link=card.host_bandwidth)
    known = {"card": card, "together": together}
    jobs = [
        job.but(load=one.load, num_micro_batches=one.num_micro_batches, num_steps=one.num_steps, **known)
        for one in steps
    ]
    return planner.fastest(jobs).but(card=job.card, together=job.together)


def _load(examples, rows, joined, device_kind):
    """Return the Load of the largest micro-batch of so many of `examples`: padded to the longest, or joined."""
    longest_first = np.sort(examples.lengths)[::-1][:rows]
    rows, longest = len(longest_first), int(examples.longest.max())
    length = -(-int(longest_first.sum()) // rows) if joined else longest
    trained = int(np.sort(examples.num_trained)[::-1][:rows].sum())
    rows *= 2 if examples.are_pairs and not joined else 1  # sequences
    scored = min(trained, rows * length)
    if device_kind == "cpu" and not joined:
        scored = rows * length  # every column that one of the rows trains has logits of all rows
    return planner.Load(rows, length, scored, joined=joined, document=longest, pairs=examples.are_pairs)


def _load_of_batches(batches, examples, joined):
    lengths = batches.real_lengths if joined else batches.lengths
    scored = max(int(examples.num_trained[batches.rows(index)].sum()) for index in range(len(batches)))
    return planner.Load(1, int(lengths.max()), scored, joined=joined, document=int(examples.lengths.max()))


def _packed_load(packs, examples, rows):
    share = float(np.max(examples.num_trained / examples.lengths))  # a pack may be full of the rows with most
    return planner.Load(
        rows,
        packs.longest,
        round(share * rows * packs.longest),
        packed=True,
        joined=True,
        document=int(examples.lengths.max()),
        attended=attended(examples.lengths),
    )


def without_data(recipe, device_kind, budget: Budget, on, together=planner.ALONE, remade=None):
    """Return the Job of `recipe` for rows of data.max_length, every token trained; raises as job_of does.

    on: the base_model.Computer that is to train. together, remade: as of job_of.
    """
    checkpoint = base_model.find(recipe.model, weights=False, task=task_of(recipe))
    config = base_model.load_config(checkpoint, recipe.model)
    recipe = base_model.settle(recipe, config, checkpoint, on)
    training, length = recipe.training, recipe.data.max_length if checkpoint.task.file.HAS_TOKENS else 1
    rows = training.filled_to // length if training.filled_to else training.per_device_train_batch_size
    remade = remade or _outlines(recipe, config, len(checkpoint.new_tokens), device_kind)
    packed = recipe.data.packing
    pairs = encoder_of(recipe.task, recipe.objective) is data.Preferences
    rows *= 2 if pairs else 1
    load = planner.Load(rows, length, rows * length, packed, packed or remade().joins, pairs=pairs)
    numbers = {"budget_bytes": budget.num_bytes, "card": budget.card, "together": together}
    numbers["positions"] = _positions(recipe, config)
    job = with_outline(recipe, remade, load=load, **numbers)
    if not training.joins_steps or packed or not remade().joins:
        return job
    lengths = np.full(training.rows_per_step, length)
    whole = 2 * lengths if pairs else lengths
    parts = {"sequences": lengths if pairs else None, "parts": together.count}
    return _fastest(job, joined_steps(whole, whole, training.rows_per_step, **parts))


def _outlines(recipe, config, num_new_tokens, device_kind):
    """Return remade(lora, num_new_tokens, packed) -> Outline, each made once."""
    made = {}
    setting = kernels.setting_of(recipe, config)

    def remade(lora=recipe.method, num_new_tokens=num_new_tokens, packed=recipe.data.packing):
        key = (repr(lora), num_new_tokens, packed and device_kind == "cpu")  # on a GPU packing allocates the same
        if key not in made:
            made[key] = planner.outline(
                config, recipe.model, recipe.quantization, lora, num_new_tokens, device_kind, packed, setting
            )
        return made[key]

    return remade


def with_outline(recipe, remade, **numbers):
    """Return the Job of `recipe` with these fields of planner.Job.

    Raises:
        InputError: the model has fewer layers than are to be checkpointed, or offloading has nothing to move.
    """
    outline, section = remade(), recipe.memory
    refuse_layers(section, outline.num_layers)
    return planner.Job(
        outline=outline,
        training=recipe.training,
        gradient_checkpointing=section.gradient_checkpointing,
        offload=section.offload,
        lora=recipe.method,
        num_new_tokens=0 if recipe.model.new_tokens is None else len(recipe.model.new_tokens),
        remade=remade,
        **numbers,
    )


def refuse_layers(section, num_layers):
    """Raise InputError where recipe section `memory` does not fit a model of `num_layers` layers."""
    setting = section.gradient_checkpointing
    if setting != "auto" and int(setting) > num_layers:
        raise InputError(
            f"memory.gradient_checkpointing is {setting}, but the model has {num_layers} layers; set 0 to {num_layers}"
        )
    if section.offload is True and setting != "auto" and not setting:
        raise InputError(
            "memory.offload moves the inputs of checkpointed layers to CPU memory, but no layer is checkpointed; set "
            "memory.gradient_checkpointing=true, or memory.offload=false"
        )


def not_supported(recipe, error, so=""):
    """Return the InputError of a planner.NoPlan. so: what follows from it."""
    return InputError(f"{recipe.model.name_or_path}: this architecture is not supported by the planner ({error}){so}")
