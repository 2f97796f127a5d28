"""The SwiGLU block (gated MLP) of a decoder layer with its three adapters: down(act(gate(x)) * up(x)).

Module by module autograd keeps gate(x), act(gate(x)), up(x) and their product; here gate(x) and up(x), from which the other
two are recomputed in the backward pass. A checkpointed layer does not keep even these: it keeps x, and recomputes the block
in its backward pass, one tile of tokens at a time. The amount of work is the same, and the widest tensors of the model, a
dozen of (tokens, intermediate_size), have the size of a tile instead of the sequence.

Each way is two autograd nodes. The first saves all that is saved, before the second multiplies: a checkpointed layer is
recomputed only until everything has been saved.
"""

from __future__ import annotations

import types

import torch
from torch.autograd.function import once_differentiable

from . import tiles
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
    """The arithmetic, on some rows of x. weights: A and B of gate, up and down."""

    def __init__(self, module):
        self.gate, self.up, self.down = (_Layer(part) for part in (module.gate_proj, module.up_proj, module.down_proj))
        self.weights = [weight for layer in (self.gate, self.up, self.down) for weight in (layer.A, layer.B)]
        self.act = module.act_fn
        self.act_backward = _BACKWARD[type(module.act_fn).__name__]
        self.width = module.down_proj.out_features

    def products(self, x_NH, weights):
        """Return gate(x), up(x), and their A x."""
        outputs, middles = [], []
        for layer, A, B in ((self.gate, *weights[:2]), (self.up, *weights[2:4])):
            middles.append(x_NH @ A.t())
            outputs.append(layer.base.product(x_NH).addmm_(middles[-1], B.t(), alpha=layer.scaling))
        return *outputs, *middles

    def hidden(self, gate_NI, up_NI):
        return self.act(gate_NI).mul_(up_NI)

    def add_down(self, part_NH, h_NI):
        """Return `part_NH` with down's base product of h, and its bias, added in place."""
        base = self.down.base
        part_NH.addmm_(h_NI, base.weight().t())
        return part_NH if base.bias is None else part_NH.add_(base.bias)

    def gradients(self, g_NH, x_NH, products, t_down, weights, wants_x):
        """Return the gradients of x (None where it is not wanted) and of the weights.

        products: what `products` returned for x. t_down: None to make it again.
        """
        gate, up, t_gate, t_up = products
        A_gate, B_gate, A_up, B_up, A_down, B_down = weights
        acted = self.act(gate)
        h_NI = acted * up
        t_down = h_NI @ A_down.t() if t_down is None else t_down
        u, *grads_down = gradients(g_NH, h_NI, t_down, B_down, self.down.scaling)
        del h_NI
        grad_h = (g_NH @ self.down.base.weight()).addmm_(u, A_down)
        grad_up = acted.mul_(grad_h)
        grad_gate = self.act_backward(grad_h.mul_(up), gate)
        del grad_h, acted
        u_gate, *grads_gate = gradients(grad_gate, x_NH, t_gate, B_gate, self.gate.scaling)
        u_up, *grads_up = gradients(grad_up, x_NH, t_up, B_up, self.up.scaling)
        grad_x = None
        if wants_x:
            grad_x = (grad_gate @ self.gate.base.weight()).addmm_(grad_up, self.up.base.weight())
            grad_x.addmm_(u_gate, A_gate).addmm_(u_up, A_up)
        return grad_x, *grads_gate, *grads_up, *grads_down


class _AllButDown(torch.autograd.Function):
    """The adapter's part of down's output (N, H); its backward pass is that of the whole block."""

    @staticmethod
    def forward(ctx, x_NH, mlp, kept, *weights):
        gate, up, t_gate, t_up = mlp.products(x_NH, weights)
        h_NI = mlp.hidden(gate, up)
        t_down = h_NI @ weights[4].t()
        kept.append(h_NI)  # for _Down, which takes it
        ctx.save_for_backward(x_NH, gate, up, t_gate, t_up, t_down, *weights)
        ctx.mlp = mlp
        return (t_down @ weights[5].t()).mul_(mlp.down.scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NH):
        x_NH, *products, t_down = ctx.saved_tensors[:6]
        grad_x, *grads = ctx.mlp.gradients(g_NH, x_NH, products, t_down, ctx.saved_tensors[6:], ctx.needs_input_grad[0])
        return grad_x, None, None, *grads


class _Down(torch.autograd.Function):
    """down's base product of the hidden numbers, added to the adapter's part in place; keeps nothing."""

    @staticmethod
    def forward(ctx, part_NH, mlp, kept):
        ctx.mark_dirty(part_NH)
        return mlp.add_down(part_NH, kept.pop())

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NH):
        return g_NH, None, None


class _Room(torch.autograd.Function):
    """Room for the output (N, H); its backward pass is that of the whole block, from x alone."""

    @staticmethod
    def forward(ctx, x_NH, mlp, *weights):
        ctx.save_for_backward(x_NH, *weights)
        ctx.mlp = mlp
        return x_NH.new_empty(len(x_NH), mlp.width)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NH):
        x_NH, *weights = ctx.saved_tensors
        mlp, wants_x = ctx.mlp, ctx.needs_input_grad[0]
        grad_x = torch.empty_like(x_NH) if wants_x else None
        sums = []  # in float32, over tiles
        for rows in tiles.of(len(x_NH)):
            x = x_NH[rows]
            part, *grads = mlp.gradients(g_NH[rows], x, mlp.products(x, weights), None, weights, wants_x)
            if grad_x is not None:
                grad_x[rows] = part
            del part
            grads = [grad.float() for grad in grads]
            sums = [total.add_(grad) for total, grad in zip(sums, grads, strict=True)] if sums else grads
        return grad_x, None, *(total.to(weight.dtype) for total, weight in zip(sums, weights, strict=True))


class _Fill(torch.autograd.Function):
    """The output, into the room there is for it; keeps nothing."""

    @staticmethod
    def forward(ctx, out_NH, x_NH, mlp):
        ctx.mark_dirty(out_NH)
        weights = [weight.detach() for weight in mlp.weights]
        for rows in tiles.of(len(x_NH)):
            gate, up, _, _ = mlp.products(x_NH[rows], weights)
            h_NI = mlp.hidden(gate, up)
            del gate, up
            part = ((h_NI @ weights[4].t()) @ weights[5].t()).mul_(mlp.down.scaling)
            out_NH[rows] = mlp.add_down(part, h_NI)  # in this order, as _Down: the same to the bit
            del h_NI, part
        return out_NH

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NH):
        return g_NH, None, None


def forward_of(module):
    """Return what computes the forward of a Llama-like MLP, or None: another structure, dropout, or plain layers.

    Where the module has an attribute `computed_again`, its layer is checkpointed (kernels.checkpointing).
    """
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

    def forward(self, x):
        flat, kept = x.reshape(-1, x.shape[-1]), []
        if getattr(self, "computed_again", False):
            y = _Fill.apply(_Room.apply(flat, mlp, *mlp.weights), flat.detach(), mlp)
        else:
            y = _Down.apply(_AllButDown.apply(flat, mlp, kept, *mlp.weights), mlp, kept)
        return y.view(x.shape)

    return types.MethodType(forward, module)
