"""y = W x + bias + scaling * B A x in one node of the autograd graph, for W in 4 bit or in 16.

PEFT's layer makes five nodes, copies of the output in three of them, and keeps what each asks for. Here the base's product
is added to in place, and what is kept for the backward pass is x (which q, k and v share) and A x, of rank R.
"""

from __future__ import annotations

import types

import torch
from torch.autograd.function import once_differentiable

# N tokens, I in_features, O out_features, R rank


class Base:
    """The frozen weight (O, I) of a linear layer, and its bias (O) or None."""

    def __init__(self, module):
        self.bias, self._module = module.bias, module
        self._state = getattr(module.weight, "quant_state", None)

    def weight(self):
        """Return W (O, I), of a 4-bit layer made anew: in the dtype that the model computes in.

        Codes that processes share are the module's weight only while its decoder layer computes.
        """
        if self._state is None:
            return self._module.weight
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self._module.weight.data, self._state)

    def product(self, x_NI):
        """Return W x + bias: a new tensor (N, O)."""
        W_OI = self.weight()
        return x_NI @ W_OI.t() if self.bias is None else torch.addmm(self.bias, x_NI, W_OI.t())


class LoraLinear(torch.autograd.Function):
    """(N, O) from x (N, I); z (N, I) is x after dropout, None where there is none.

    Source: LoRA (arXiv:2106.09685) eq. 3.
    """

    @staticmethod
    def forward(ctx, x_NI, z_NI, A_RI, B_OR, base, scaling):
        z = x_NI if z_NI is None else z_NI
        t_NR = z @ A_RI.t()
        y_NO = base.product(x_NI).addmm_(t_NR, B_OR.t(), alpha=scaling)
        ctx.save_for_backward(z, t_NR, A_RI, B_OR)
        ctx.base, ctx.scaling, ctx.dropout = base, scaling, z_NI is not None
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NO):
        z, t_NR, A_RI, B_OR = ctx.saved_tensors
        u_NR, grad_A, grad_B = gradients(g_NO, z, t_NR, B_OR, ctx.scaling)
        grad_x = g_NO @ ctx.base.weight() if ctx.needs_input_grad[0] else None
        if ctx.dropout:
            return grad_x, u_NR @ A_RI, grad_A, grad_B, None, None
        return None if grad_x is None else grad_x.addmm_(u_NR, A_RI), None, grad_A, grad_B, None, None


def gradients(g_NO, z_NI, t_NR, B_OR, scaling):
    """Return (what flows back to z before A: (N, R); the gradient of A; that of B)."""
    u_NR = (g_NO @ B_OR).mul_(scaling)
    return u_NR, u_NR.t() @ z_NI, (g_NO.t() @ t_NR).mul_(scaling)


def adapted(module):
    """Return (A, B, scaling, dropout module or None) of a PEFT layer with one plain LoRA on a linear base, else None.

    DoRA, other methods, trained biases and Conv1D go PEFT's way.
    """
    from peft.tuners.lora import Linear as LoraOnLinear
    from peft.tuners.lora.bnb import Linear4bit as LoraOn4bit

    if type(module) not in (LoraOnLinear, LoraOn4bit) or not _is_linear(module.get_base_layer()):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or module.disable_adapters or module.merged or names[0] in module.lora_variant:
        return None
    (name,) = names
    A, B, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    bias = module.get_base_layer().bias
    if B.bias is not None or (bias is not None and bias.requires_grad):
        return None
    return A.weight, B.weight, module.scaling[name], None if isinstance(dropout, torch.nn.Identity) else dropout


def _is_linear(base):
    from bitsandbytes.nn import Linear4bit

    return type(base) in (torch.nn.Linear, Linear4bit) and not getattr(base.weight, "requires_grad", False)


def forward_of(module):
    """Return what computes a PEFT layer's forward in one node, or None where `adapted` is None."""
    found = adapted(module)
    if found is None:
        return None
    A, B, scaling, dropout = found
    base = Base(module.get_base_layer())

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        z = dropout(flat) if dropout is not None and self.training else None
        return LoraLinear.apply(flat, z, A, B, base, scaling).view(*x.shape[:-1], B.shape[0])

    return types.MethodType(forward, module)
