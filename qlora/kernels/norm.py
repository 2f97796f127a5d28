"""RMSNorm with a frozen weight: keeps its input in the model's dtype and one number a token.

Module by module autograd keeps the input in float32 twice over and the normalized input besides. What is computed in
float32 is a tile of tokens at a time: Llama-3-8B on 24 GB gets rows 11 % longer by that, by its plan.
"""

from __future__ import annotations

import types

import torch
from torch.autograd.function import once_differentiable

from . import tiles

# N tokens, H width


class RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * w, computed in float32 and rounded once. Source: arXiv:1910.07467 eq. 4."""

    @staticmethod
    def forward(ctx, x_NH, weight_H, eps):
        tokens, out = _tokens(x_NH), torch.empty_like(x_NH, memory_format=torch.contiguous_format)
        rstd_N1 = x_NH.new_empty(*tokens.shape[:-1], 1, dtype=torch.float32)
        for rows in tiles.of(len(tokens)):
            x = tokens[rows].float()
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            rstd_N1[rows] = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            _tokens(out)[rows] = (x * rstd_N1[rows]).mul_(weight_H)
            del x, length
        ctx.save_for_backward(x_NH, rstd_N1, weight_H)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NH):
        x_NH, rstd_N1, weight_H = ctx.saved_tensors
        grad_x = torch.empty_like(x_NH, memory_format=torch.contiguous_format)
        tokens, gradients = _tokens(x_NH), _tokens(g_NH)
        for rows in tiles.of(len(tokens)):
            normed = tokens[rows].float() * rstd_N1[rows]
            g = gradients[rows] * weight_H  # float32, as the weight is
            mean = (g * normed).mean(-1, keepdim=True)
            _tokens(grad_x)[rows] = g.sub_(normed.mul_(mean)).mul_(rstd_N1[rows])
            del normed, g, mean
        return grad_x, None, None


def _tokens(x):
    """Return x (B, T, ...) with its tokens one after another: (B * T, ...)."""
    return x if x.dim() < 3 else x.flatten(0, 1)


def settings(module):
    """Return (scale (H,) float32, eps) of a module called ...RMSNorm, or None: another one, or its weight is trained."""
    name = type(module).__name__
    weight = getattr(module, "weight", None) if name.endswith("RMSNorm") else None  # of PEFT's wrappers it is a copy
    if weight is None or weight.requires_grad:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or weight.dim() != 1:
        return None
    return weight.detach().float() + (1 if name.startswith("Gemma") else 0), eps


def forward_of(module):
    """Return what computes the forward of a module that has `settings`, or None."""
    found = settings(module)
    if found is None:
        return None
    scale, eps = found

    def forward(self, x):
        return RmsNorm.apply(x, scale, eps)

    return types.MethodType(forward, module)
