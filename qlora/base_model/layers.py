"""The parts of a model that others ask for: linear layers, decoder layers, tensors, how many parameters."""

from __future__ import annotations

import torch

from . import tasks
from .quantized import quantized_modules


def is_conv1d(module):
    """True for GPT-2's linear layers, which store their weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_names(model):
    """Return the names of the linear layers that can carry an adapter: all but the head."""
    head = {
        name
        for one in tasks.of_model(model).kept_names(model)
        for name, _ in model.get_submodule(one).named_modules(prefix=one)
    }
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) or is_conv1d(module)) and name not in head
    ]


def token_ends(model):
    """Return the embedding of tokens and, where the model answers with words, the head; [] of a model that reads no tokens."""
    if not tasks.of_model(model).HAS_TOKENS:
        return []
    return [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]


def tied(model):
    """Return {parameter: the one that it is the same tensor as}: where the files need not hold it."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def decoder_layers(model):
    """Return the list of decoder layers of a plain, PEFT or multimodal model: the module list with most parameters."""
    is_whole = model.config.get_text_config() is not model.config  # a vision tower has layers too
    inside = model.get_decoder() if is_whole else model
    lists = [module for module in inside.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def tensors(model):
    """Return all tensors that a plain or PEFT model holds: parameters, buffers, and the constants of 4-bit weights."""
    states = [module.weight.quant_state for module in quantized_modules(model).values()]
    states += [state.state2 for state in states if state.nested]
    constants = [tensor for state in states for tensor in (state.absmax, state.code, getattr(state, "offset", None))]
    parameters = [
        getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters()
    ]  # a share, of a DTensor
    return [t for t in (*parameters, *model.buffers(), *constants) if t is not None]


def num_bytes(tensors):
    """Return the bytes of tensors, shared ones once; 4-bit weights in 4 bit, of those in shares the one of this process."""
    here = {id(tensor): tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in here.values())


def numel(weight):
    """Return how many numbers a weight stands for, in 4 bit or not."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else state.shape.numel()


def num_parameters(model):
    """Return (trainable, total) counts of numbers, a tied weight's once."""
    counts = [(numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trains in counts if trains), sum(count for count, _ in counts)
