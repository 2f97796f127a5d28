"""LoRA, rsLoRA and DoRA: A (R, I), B (O, R); y = W x + scaling * B A x; scaling = lora_alpha / r, or lora_alpha / sqrt(r).

DoRA: magnitude m (O); W + scaling * B A, each row scaled to the length m.
"""

from __future__ import annotations

import contextlib
import types

import torch

from .. import base_model
from ..recipe.methods import divisor, pattern_of
from ..system.errors import InputError
from . import initial_weights, low_rank, peft_model, targets
from .adapter import Sorted, refuse_unknown_settings
from .contract import Description, Group, Trainable, one_group

save, fill = peft_model.save, peft_model.fill

# settings of a folder that are followed; any other that is on is refused by name
_FIELDS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "lora_bias",
           "ensure_weight_tying")  # fmt: skip


def attach(model, section, seed=0, token_ids=(), checkpoint=None, examples=()):
    """See contract.Method. checkpoint: LoftQ starts from it; examples: EVA does."""
    layers, whole = targets.chosen(model, section, token_ids)
    _refuse_tying(model, section, whole)
    _refuse_patterns(section, layers)
    # EVA may give a layer up to twice the rank, from others that need less
    factor, note = {"eva": (2, " (EVA: up to twice that)"), "lora_ga": (2, " (LoRA-GA takes twice that)")}.get(
        section.init_lora_weights, (1, "")
    )
    low_rank.refuse_ranks(model, {name: _rank(section, name) for name in layers}, factor, note)
    _refuse_biases(model, section, layers)
    # made on the meta device at once, not moved there: at high ranks that is seconds and gigabytes
    on_meta = next(model.parameters()).is_meta
    if not on_meta:
        initial_weights.refuse(model, section)
    torch.manual_seed(seed)
    with torch.device("meta") if on_meta else contextlib.nullcontext():
        attached = peft_model.make(model, _config(model, section, layers, whole, token_ids, on_meta))
    _refuse_untieable(model, section)
    if not on_meta:
        initial_weights.initialize(attached, section, checkpoint, examples)
    peft_model.to_dtype(attached, peft_model.dtype_of(model))
    return attached


def _config(model, section, layers, whole, token_ids, on_meta):
    from peft import LoraConfig

    return LoraConfig(
        **peft_model.settings(model, layers, whole, token_ids),
        lora_dropout=section.lora_dropout,
        bias=section.bias,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        lora_bias=section.lora_bias,
        ensure_weight_tying=section.ensure_weight_tying,
        **initial_weights.settings(section, on_meta),
    )


def trainable(model, section):
    began = "" if section.init_lora_weights is True else f", from {section.init_lora_weights}"
    return Trainable(
        f"{'DoRA, ' if section.use_dora else ''}r = {section.r}{began}",
        first_to_move=peft_model.named(model, ".lora_B."),
        groups=_groups(model, section.loraplus_lr_ratio),
        held=initial_weights.held(model, section),
    )


def _groups(model, ratio):
    """Return the groups of LoRA+ (arXiv:2402.12354): B and its bias learn `ratio` times faster; None: all alike."""
    if ratio is None:
        return one_group(model)
    names = one_group(model)[0].names
    fast = tuple(name for name in names if ".lora_B." in name or ".lora_embedding_B." in name)
    return (Group(tuple(name for name in names if name not in fast)), Group(fast, learning_rate=ratio))


def load(model, adapter, token_ids=()):
    from peft import LoraConfig
    from peft.tuners.lora.dora import DoraLinearLayer

    loaded = peft_model.load(model, adapter, token_ids, LoraConfig, _FIELDS)
    for module in loaded.modules():
        if type(module) is DoraLinearLayer:
            module.forward = types.MethodType(_frozen_dora, module)
    return loaded


def _frozen_dora(layer, x, **places):
    """DoraLinearLayer.forward of weights that no longer change, to the same bits: m / |W + s B A| is computed once.

    PEFT 0.21 dequantizes W and multiplies B A out for each token; its DoraCaching keeps B A, a copy of the model in 16 bit.
    places: its other arguments.
    """
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.utils.integrations import dequantize_module_weight

    base_result, bias = places.get("base_result"), places["base_layer"].bias
    if base_result is None:
        return DoraLinearLayer.forward(layer, x, **places)
    kept, key = vars(layer).setdefault("scales", {}), (x.dtype, layer.weight.dtype, x.device)
    if key not in kept:
        B_A = layer.get_lora_weight(lora_A=places["lora_A"], lora_B=places["lora_B"]).to(x.dtype)
        weight = dequantize_module_weight(places["base_layer"]).to(x.dtype)
        kept[key] = (layer.weight / layer.get_weight_norm(weight, B_A, places["scaling"])).view(1, -1)
    scale = kept[key]
    base_result = base_result if bias is None else base_result - bias
    return (scale - 1) * base_result + scale * places["lora_B"](places["lora_A"](x)) * places["scaling"]


def section_of(folder, config, recorded):
    """See methods.section_of: ranks and layers of the folder, whatever start made them; LoftQ's stays known."""
    from ..recipe import Lora

    named = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "bias", "ensure_weight_tying", "modules_to_save",
             "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern", "lora_dropout")  # fmt: skip
    targets = config.get("target_modules")
    said = {name: config[name] for name in named if config.get(name) is not None}
    said |= {"target_modules": targets if isinstance(targets, str) else sorted(targets or ())}
    if recorded is not None:
        said |= {"loraplus_lr_ratio": recorded.loraplus_lr_ratio, "lora_dropout": recorded.lora_dropout}
        said |= {"init_lora_weights": "loftq"} if recorded.corrects_quantization else {}
    try:
        return Lora(**said)
    except ValueError as error:
        raise InputError(f"{folder}: {str(error).splitlines()[0]}; it cannot be trained further") from None


def describe(config):
    if config.get("use_dora"):
        return Description("DoRA", f"r={config['r']}", "m * ({W} + s B A) / |{W} + s B A|")
    return Description("LoRA", f"r={config['r']}", "{W} + s B A")


def read(folder, config):
    refuse_unknown_settings(folder, config, {*_FIELDS, *low_rank.SILENT})
    patterns = {"alpha_pattern": "lora_alpha", "rank_pattern": "r"}
    low_rank.refuse_settings(folder, config, ("r", "lora_alpha"), patterns)
    found = Sorted(folder, config, low_rank.PATTERN, low_rank.MARKER, "LoRA")
    settings = low_rank.by_module(folder, config, found.own, patterns)
    updates = {module: _update(found, module, *settings[module]) for module in sorted(found.own)}
    bias_deltas = {
        module: update.scaling * found.own[module]["B.bias"].float()
        for module, update in updates.items()
        if update is not None and "B.bias" in found.own[module]
    }
    return found.adapter(
        describe(config).kind,
        updates,
        bias_deltas=bias_deltas,
        stays_tied=bool(config.get("ensure_weight_tying")),
        beside=True,
    )


def _update(found, module, alpha, rank):
    needed = ("magnitude_vector",) if found.config.get("use_dora") else ()
    pair = low_rank.factors(found, module, rank, needed, may_have=("B.bias",))
    if pair is None:
        return None
    A_RI, B_OR = pair
    magnitude = found.own[module].get("magnitude_vector")
    if magnitude is not None and magnitude.shape != (len(B_OR),):
        found.problems.append(f"{module}: magnitude is {tuple(magnitude.shape)}, the weight has {len(B_OR)} rows")
        return None
    scaling = alpha / divisor(rank, found.config.get("use_rslora"))
    return low_rank.LowRank(A_RI, B_OR, scaling, magnitude)


# ---- refused before it is attached -----------------------------------------------------------------------------------


def _rank(section, name):
    """Return (field of the recipe, the rank that it gives a layer)."""
    pattern = pattern_of(section.rank_pattern, name)
    return (
        ("lora.r", section.r) if pattern is None else (f"lora.rank_pattern {pattern!r}", section.rank_pattern[pattern])
    )


def _refuse_patterns(section, layers):
    problems = []
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(section, field):
            matches = any(pattern_of([pattern], name) for name in layers)
            problems += [] if matches else [f"lora.{field}: {pattern!r} matches no layer that gets an adapter"]
    if problems:
        leaves = sorted({name.rpartition(".")[2] for name in layers})
        raise InputError.listing("the recipe", problems, f"adapters go to: {', '.join(leaves)}")


def _refuse_biases(model, section, layers):
    without = low_rank.without_bias(model, layers)
    if section.lora_bias and without:
        raise InputError(
            f"lora.lora_bias: {len(without)} of {len(layers)} layers have no bias that it could be merged into "
            f"({without[0]}, ...); name layers that have one in target_modules"
        )
    low_rank.refuse_biases(model, section, layers)


def _refuse_tying(model, section, whole):
    ends = base_model.token_ends(model)
    tied = len(ends) == 2 and ends[0].weight is ends[1].weight
    if section.ensure_weight_tying and not (tied and any(model.get_submodule(name) in ends for name in whole)):
        raise InputError(
            "lora.ensure_weight_tying: has no effect; it is for modules_to_save that name the embedding or the head of a "
            "model where they are one matrix"
        )


def _refuse_untieable(model, section):
    """Raise InputError if PEFT, which knows them by name, has untied embedding and head."""
    if section.ensure_weight_tying and model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        raise InputError(
            "lora.ensure_weight_tying: PEFT only supports it for modules named embed_tokens and lm_head; leave it out"
        )
