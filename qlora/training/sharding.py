"""What memory.sharding does not do: refused by name, before a row is read."""

from __future__ import annotations

from ..system.errors import InputError

_LAUNCH = "torchrun --nproc_per_node 2 -m qlora train RECIPE"


def refuse_unsupported(recipe, are_several):
    """Raise InputError unless `recipe`, which has memory.sharding, can be trained by processes that share the base.

    are_several: a launcher has started this process as one of several.
    """
    if not are_several:
        raise InputError(
            f"memory.sharding: {recipe.memory.sharding} is for several processes, one a card; start them with: {_LAUNCH}\n"
            "  or set memory.sharding=null"
        )
    for is_so, what, remedy in _refused(recipe):
        if is_so:
            raise InputError(
                f"memory.sharding: {recipe.memory.sharding} does not go with {what}; {remedy}, or set memory.sharding=null"
            )


def can_share(recipe):
    """Return whether processes can share the base of `recipe`."""
    return not any(is_so for is_so, *_ in _refused(recipe))


def _refused(recipe):
    """Yield (whether it is so, what does not go with shares of the base, what to change)."""
    method, key = recipe.method, recipe.method.key
    yield (
        recipe.quantization is None,
        "quantization: null, because 4-bit codes are what is shared",
        "set a quantization",
    )
    yield key != "lora", f"{key}, whose layers read whole weights", "train a lora: section"
    yield method.use_dora, "lora.use_dora, whose norms are those of whole weights", "set lora.use_dora=false"
    start = method.init_lora_weights
    reads = start not in (True, "gaussian", "orthogonal")
    yield reads, f"lora.init_lora_weights={start}, which reads whole weights", "set lora.init_lora_weights=true"
    yield method.bias != "none", f"lora.bias={method.bias}", "set lora.bias=none"
    yield bool(method.modules_to_save), "lora.modules_to_save, modules that are trained whole", "leave it out"
    yield recipe.model.new_tokens is not None, "model.new_tokens, whose rows are trained", "leave them out"
