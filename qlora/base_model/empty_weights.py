"""Tensors that have the shape of a weight and take no memory."""

from __future__ import annotations

import torch


def stand_in(shape, dtype, device):
    """Return a tensor that has shape, dtype and device of a weight, takes no memory and survives to_float32 so."""
    return torch.zeros(1, dtype=dtype, device=device).as_strided(shape, [0] * len(shape))


def replace_by_stand_ins(model):
    """Put a stand-in on the CPU in the place of every parameter of a model on the meta device."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                made = stand_in(parameter.shape, parameter.dtype, "cpu")
                module._parameters[leaf] = torch.nn.Parameter(made, requires_grad=False)


def is_stand_in(tensor):
    return tensor.dim() > 0 and not any(tensor.stride())


def upcast(tensor):
    """Return `tensor` in float32; a stand-in stays one."""
    if is_stand_in(tensor):
        return tensor[(0,) * tensor.dim()].float().as_strided(tensor.shape, tensor.stride())
    return tensor.float()
