"""RMSNorm with a frozen weight: keeps its input in the model's dtype and one number a token.

Module by module autograd keeps the input in float32 twice over and the normalized input besides.
"""

from __future__ import annotations

import types

import torch
from torch.autograd.function import once_differentiable

# N tokens, H width


class RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * w, computed in float32 and rounded once. Source: arXiv:1910.07467 eq. 4."""

    @staticmethod
    def forward(ctx, x_NH, weight_H, eps):
        x = x_NH.float()
        rstd_N1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_NH, rstd_N1, weight_H)
        return (x * rstd_N1).mul_(weight_H).to(x_NH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NH):
        x_NH, rstd_N1, weight_H = ctx.saved_tensors
        normed = x_NH.float() * rstd_N1
        g = g_NH * weight_H  # float32, as the weight is
        mean = (g * normed).mean(-1, keepdim=True)
        return g.sub_(normed.mul_(mean)).mul_(rstd_N1).to(x_NH.dtype), None, None


def forward_of(module):
    """Return what computes the forward of a module called ...RMSNorm, or None: another one, or its weight is trained."""
    name = type(module).__name__
    weight = getattr(module, "weight", None) if name.endswith("RMSNorm") else None  # of PEFT's wrappers it is a copy
    if weight is None or weight.requires_grad:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or weight.dim() != 1:
        return None
    scale = weight.detach().float() + (1 if name.startswith("Gemma") else 0)

    def forward(self, x):
        return RmsNorm.apply(x, scale, eps)

    return types.MethodType(forward, module)
