"""A model with shapes and without numbers: what planning, merging and checking ask before a weight is read."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from ..system.errors import InputError
from . import attention_choice, tasks
from .compute_dtype import of_model
from .layers import is_conv1d
from .messages import said
from .prequantized import names_in_4_bit
from .quantized import BLOCKSIZE, DTYPE_WHEN_QUANTIZED, dtype_of


def on_meta(config, trust_remote_code=False):
    """Return the model of a transformers config, with shapes and without numbers.

    Raises:
        InputError: no model can be built of these sizes.
    """
    try:
        with torch.device("meta"):
            task = tasks.of_config(config)
            auto = task.auto_class()
            config = copy.deepcopy(config)  # from_config writes the dtype into it
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # an architecture computes with what its config says: sizes below zero, function names
        raise InputError(
            f"{Path(config.name_or_path) / 'config.json'}: no model can be built of it: {said(error)}"
        ) from error
    return task.accept_arguments(model)


def names_to_quantize(config, section):
    """Return the names of the layers that are in 4 bit in a quantized model with this config."""
    return names_in_4_bit(on_meta(config, section.trust_remote_code))


def load_on_meta(config, section, quantization, dtype=None, codes=True):
    """Return the model that `load` returns for this config, its 4-bit layers too, with shapes and without numbers.

    config: the transformers config, grown to the new tokens, see `load_config`. codes: False for 4-bit layers that are not
    quantized yet, as transformers makes them on the meta device.
    """
    from bitsandbytes.nn import Linear4bit

    model = on_meta(config, section.trust_remote_code)
    computed = dtype_of(of_model(section, quantization))
    # as in `load`: 4-bit layers compute in what the recipe says, whatever the files were read in
    dtype = computed if dtype is None or (quantization and computed != DTYPE_WHEN_QUANTIZED) else dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if quantization:
        for name in names_in_4_bit(model):
            old = model.get_submodule(name)
            num_in, num_out = old.weight.shape if is_conv1d(old) else reversed(old.weight.shape)
            bias = old.bias is not None
            new = Linear4bit(num_in, num_out, bias, computed, quant_type=quantization.quant_type, device="meta")
            new.bias = old.bias
            if codes:
                new.weight = _weight_on_meta(num_in, num_out, quantization, dtype)
            new.support_avx512bf16_for_cpu = False
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
        model.is_loaded_in_4bit = True  # what PEFT chooses its layers by
    if section.attn_implementation in attention_choice.OF_TORCH[1:]:
        model.set_attn_implementation(section.attn_implementation)
    elif section.attn_implementation != "auto":
        model.config._attn_implementation = (
            section.attn_implementation
        )  # transformers would ask for its package, or get it
    model.requires_grad_(False)
    return model.eval()


def _weight_on_meta(num_in, num_out, quantization, dtype):
    """Return the Params4bit (num_out, num_in): codes, and the constants that double quantization has of them."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    def on_meta(count, dtype=torch.float32):
        return torch.empty(count, dtype=dtype, device="meta")

    count = num_in * num_out
    num_blocks = -(-count // BLOCKSIZE)
    shared = {"shape": torch.Size((num_out, num_in)), "blocksize": BLOCKSIZE, "quant_type": quantization.quant_type}
    if quantization.use_double_quant:
        nested = QuantState(on_meta(-(-num_blocks // 256)), code=on_meta(256), blocksize=256, dtype=torch.float32)
        shared |= {"offset": on_meta(()), "state2": nested}
    absmax = on_meta(num_blocks, torch.uint8 if quantization.use_double_quant else torch.float32)
    state = QuantState(absmax, code=on_meta(16), dtype=dtype, **shared)
    codes = on_meta((-(-count // 2), 1), torch.uint8)
    weight = Params4bit(codes, False, state, quant_type=quantization.quant_type, bnb_quantized=True)
    weight.__deepcopy__ = lambda memo: weight  # bitsandbytes 0.50.2 can copy only to a CPU; PEFT's DoRA makes a copy
    return weight
