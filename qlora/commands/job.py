"""What plan and train share: a recipe and its data as a planning.Job."""

from __future__ import annotations

import numpy as np

from .. import data
from .. import plan as planning
from ..data import Batches, Packs
from ..kernels import attention


def job_of(recipe, prepared, device_kind, budget, card=None):
    """Return the planning.Job of `recipe` on its data. device_kind: "cuda" or "cpu"; budget: bytes; card: for the speed."""
    training, examples, batches, held_out = recipe.training, prepared.examples, prepared.batches, prepared.eval_examples
    packs = batches if isinstance(batches, Packs) else None
    rows = training.per_device_train_batch_size
    numbers = {"num_tokens": int(examples.lengths.sum()), "num_micro_batches": -(-len(batches) // rows)}
    joins = recipe.kernels == "auto" and attention.why_not(prepared.config) is None
    if packs is not None:
        load = _packed_load(packs, examples, rows)
    else:
        if isinstance(batches, Batches):
            rows = max(1, training.tokens_per_micro_batch // int(examples.lengths.max()))
        load = _load(examples, rows, joins)
        if attention.why_not(prepared.config) is None:
            packs = data.pack(examples, recipe.data.max_length)
            numbers |= {"packed_load": _packed_load(packs, examples, 1), "packed_micro_batches": len(packs)}
    if len(held_out):
        numbers["eval_load"] = _load(held_out, training.per_device_eval_batch_size, joins or load.packed)
    num_new = len(prepared.checkpoint.new_tokens)
    return with_outline(
        recipe, prepared.config, num_new, device_kind, load=load, budget_bytes=budget, card=card, **numbers
    )


def _load(examples, rows, joined):
    """Return the Load of the largest micro-batch of so many of `examples`: padded to the longest, or joined."""
    longest_first = np.sort(examples.lengths)[::-1][:rows]
    rows, longest = len(longest_first), int(longest_first[0])
    length = -(-int(longest_first.sum()) // rows) if joined else longest
    scored = min(int(np.sort(examples.num_trained)[::-1][:rows].sum()), rows * length)
    return planning.Load(rows, length, scored, joined=joined, document=longest)


def _packed_load(packs, examples, rows):
    share = float(np.max(examples.num_trained / examples.lengths))  # a pack may be full of the rows with most
    return planning.Load(
        rows,
        packs.longest,
        round(share * rows * packs.longest),
        packed=True,
        joined=True,
        document=int(examples.lengths.max()),
    )


def with_outline(recipe, config, num_new_tokens, device_kind, **numbers):
    """Return the Job of `recipe` with these fields of planning.Job."""
    made = {}

    def remade(lora=recipe.lora, num_new_tokens=num_new_tokens, packed=numbers["load"].packed):
        key = (repr(lora), num_new_tokens, packed and device_kind == "cpu")  # on a GPU packing allocates the same
        if key not in made:
            made[key] = planning.outline(
                config, recipe.model, recipe.quantization, lora, num_new_tokens, device_kind, packed, recipe.kernels
            )
        return made[key]

    return planning.Job(
        outline=remade(),
        training=recipe.training,
        gradient_checkpointing=recipe.memory.gradient_checkpointing,
        offload=recipe.memory.offload,
        lora=recipe.lora,
        num_new_tokens=num_new_tokens,
        remade=remade,
        **numbers,
    )
