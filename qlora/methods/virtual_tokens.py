"""What prompt and prefix tuning share: N trained vectors that stand before each text, in PEFT's own folder.

PEFT's forward and generate are not used: see the methods' own.
"""

from __future__ import annotations

import contextlib
import types

import torch
from safetensors.torch import load_file

from ..system.errors import InputError
from . import peft_model
from .adapter import Adapter, refuse_unknown_settings
from .folder import CONFIG, WEIGHTS

# N virtual tokens, W numbers that each of them has

SHAPE = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
_KEY = "prompt_embeddings"


def attached(model, config, forward, generate):
    """Return the PeftModel of a config, in the model's dtype, which computes and answers with these functions of it.

    forward, generate: as those of the model inside, with the PeftModel before their arguments.
    """
    found = peft_model.make(model, config)
    found.prompt_encoder.to(model.get_input_embeddings().weight.device)
    peft_model.to_dtype(found, peft_model.dtype_of(model))

    found.forward, found.generate = types.MethodType(forward, found), types.MethodType(generate, found)
    found.disable_adapter = types.MethodType(_disabled, found)
    found.num_virtual_tokens = config.num_virtual_tokens
    return found


@contextlib.contextmanager
def _disabled(model):
    base, own = model.get_base_model(), (model.forward, model.generate, model.num_virtual_tokens)
    model.forward, model.generate, model.num_virtual_tokens = base.forward, base.generate, 0
    try:
        yield
    finally:
        model.forward, model.generate, model.num_virtual_tokens = own


def with_mask(attention_mask, number):
    """Return the mask (B, T) of tokens as that of `number` virtual tokens and these, (B, number + T)."""
    return torch.cat([attention_mask.new_ones(len(attention_mask), number), attention_mask], dim=1)


# ---- saved and loaded ------------------------------------------------------------------------------------------------


def read(folder, config, kind, width, followed, why):
    """Return the Adapter of a folder with N vectors of `width` numbers; None where the config lacks what that is made of.

    kind: as the field calls it. followed: settings that may be on beside SHAPE. why: it cannot be merged, and what to do instead.
    """
    refuse_unknown_settings(folder, config, {*SHAPE, *followed})
    tensors, shape = load_file(folder / WEIGHTS), (config.get("num_virtual_tokens"), width)
    if tensors.keys() != {_KEY} or tuple(tensors[_KEY].shape) != shape:
        raise InputError(f"adapter {folder}: {WEIGHTS} does not hold the {shape} embeddings that {CONFIG} speaks of")
    if not torch.isfinite(tensors[_KEY]).all():
        raise InputError(f"adapter {folder}: {_KEY}: contains non-finite values")
    return Adapter(folder, config, kind, {}, own=tensors, unmergeable=why, beside=True)


def fill(model, adapter):
    """Give the virtual tokens the numbers of an Adapter."""
    weight, found = model.prompt_encoder["default"].embedding.weight, adapter.own[_KEY]
    if weight.shape != found.shape:
        raise InputError(f"adapter {adapter.folder}: has {len(found)} embeddings, the recipe {len(weight)}")
    with torch.no_grad():
        weight.copy_(found)
