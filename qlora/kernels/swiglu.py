"""The gated feed-forward part of a decoder layer with its three adapters: down(act(gate(x)) * up(x)).

Module by module autograd keeps gate(x), act(gate(x)), up(x) and their product; here gate(x) and up(x), from which the other
two are made again in the backward pass. It is two nodes: all that is kept is kept by the first, so that a checkpointed
layer, which is computed again only until everything has been kept, does not multiply by down's weight a second time.
"""

from __future__ import annotations

import types

import torch
from torch.autograd.function import once_differentiable

from .linear import Base, adapted, gradients

# N tokens, H hidden_size, I intermediate_size, R rank

_BACKWARD = {
    "SiLUActivation": torch.ops.aten.silu_backward,
    "SiLU": torch.ops.aten.silu_backward,
    "GELUTanh": lambda g, x: torch.ops.aten.gelu_backward(g, x, approximate="tanh"),
    "PytorchGELUTanh": lambda g, x: torch.ops.aten.gelu_backward(g, x, approximate="tanh"),
    "GELUActivation": torch.ops.aten.gelu_backward,
}


class _Layer:
    """One of the three linear layers: a Base and its adapter."""

    def __init__(self, module):
        self.A, self.B, self.scaling, self.dropout = adapted(module)
        self.base = Base(module.get_base_layer())


class _Mlp:
    def __init__(self, module):
        self.gate, self.up, self.down = (_Layer(part) for part in (module.gate_proj, module.up_proj, module.down_proj))
        self.act = module.act_fn
        self.act_backward = _BACKWARD[type(module.act_fn).__name__]

    def hidden(self, gate_NI, up_NI):
        return self.act(gate_NI).mul_(up_NI)


class _AllButDown(torch.autograd.Function):
    """The adapter's part of down's output (N, H); its backward pass is that of the whole feed-forward part."""

    @staticmethod
    def forward(ctx, x_NH, mlp, kept, A_gate, B_gate, A_up, B_up, A_down, B_down):
        outputs, middles = [], []
        for layer, A, B in ((mlp.gate, A_gate, B_gate), (mlp.up, A_up, B_up)):
            middles.append(x_NH @ A.t())
            outputs.append(layer.base.product(x_NH).addmm_(middles[-1], B.t(), alpha=layer.scaling))
        h_NI = mlp.hidden(*outputs)
        t_NR = h_NI @ A_down.t()
        kept.append(h_NI)  # for _Down, which takes it
        ctx.save_for_backward(x_NH, *outputs, *middles, t_NR, A_gate, B_gate, A_up, B_up, A_down, B_down)
        ctx.mlp = mlp
        return (t_NR @ B_down.t()).mul_(mlp.down.scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NH):
        x_NH, gate, up, t_gate, t_up, t_down, A_gate, B_gate, A_up, B_up, A_down, B_down = ctx.saved_tensors
        mlp = ctx.mlp
        acted = mlp.act(gate)
        u, grad_A_down, grad_B_down = gradients(g_NH, acted * up, t_down, B_down, mlp.down.scaling)
        grad_h = (g_NH @ mlp.down.base.weight()).addmm_(u, A_down)
        grad_up = acted.mul_(grad_h)
        grad_gate = mlp.act_backward(grad_h.mul_(up), gate)
        del grad_h, acted
        u_gate, grad_A_gate, grad_B_gate = gradients(grad_gate, x_NH, t_gate, B_gate, mlp.gate.scaling)
        u_up, grad_A_up, grad_B_up = gradients(grad_up, x_NH, t_up, B_up, mlp.up.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_gate @ mlp.gate.base.weight()).addmm_(grad_up, mlp.up.base.weight())
            grad_x.addmm_(u_gate, A_gate).addmm_(u_up, A_up)
        return grad_x, None, None, grad_A_gate, grad_B_gate, grad_A_up, grad_B_up, grad_A_down, grad_B_down


class _Down(torch.autograd.Function):
    """down's base product of the hidden numbers, added to the adapter's part in place; keeps nothing."""

    @staticmethod
    def forward(ctx, part_NH, mlp, kept):
        ctx.mark_dirty(part_NH)
        base = mlp.down.base
        part_NH.addmm_(kept.pop(), base.weight().t())
        return part_NH if base.bias is None else part_NH.add_(base.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NH):
        return g_NH, None, None


def forward_of(module):
    """Return what computes the forward of a Llama-like MLP, or None: another structure, dropout, or plain layers."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if None in parts or {name for name, _ in module.named_children()} != {
        "gate_proj",
        "up_proj",
        "down_proj",
        "act_fn",
    }:
        return None
    found = [adapted(part) for part in parts]
    if any(one is None or one[3] is not None for one in found) or type(module.act_fn).__name__ not in _BACKWARD:
        return None
    mlp = _Mlp(module)
    weights = [weight for layer in (mlp.gate, mlp.up, mlp.down) for weight in (layer.A, layer.B)]

    def forward(self, x):
        kept = []
        part = _AllButDown.apply(x.reshape(-1, x.shape[-1]), mlp, kept, *weights)
        return _Down.apply(part, mlp, kept).view(x.shape)

    return types.MethodType(forward, module)
