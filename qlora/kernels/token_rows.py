"""Rows of new tokens in a frozen embedding and head: only these rows get a gradient.

PEFT's layer copies the whole table with the rows in it, (V, H), and its gradient is a whole table too: 3 x 1.05 GB a table of
Llama-3-8B, of which a few rows are used. Here the frozen table computes as it is, a small product computes the new rows, and what
is kept for the backward pass has no V in it.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# N positions, H hidden_size, V vocabulary, R new rows


class Embedded(torch.autograd.Function):
    """(..., H): `output` of the frozen embedding, with rows (R, H) where `places` (...) is under R; else it is R."""

    @staticmethod
    def forward(ctx, rows_RH, output, places):
        ctx.save_for_backward(places)
        ctx.num_rows = len(rows_RH)
        found = F.embedding(places.clamp(max=ctx.num_rows - 1), rows_RH)
        return torch.where((places < ctx.num_rows).unsqueeze(-1), found, output)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (places,) = ctx.saved_tensors
        R = ctx.num_rows  # the row beyond, of all other tokens, is left out as an embedding leaves out its padding
        return torch.ops.aten.embedding_dense_backward(g, places, R + 1, R, False)[:R], None, None


class Head(torch.autograd.Function):
    """(..., V) from x (..., H): logits of a frozen head (V, H) whose rows `ids` (R) are `rows` (R, H) instead."""

    @staticmethod
    def forward(ctx, x, weight_VH, rows_RH, ids_R):
        ctx.save_for_backward(x, weight_VH, rows_RH, ids_R)
        return F.linear(x, weight_VH).index_copy_(-1, ids_R, F.linear(x, rows_RH))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight_VH, rows_RH, ids_R = ctx.saved_tensors
        g_NV, x_NH = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        g_NR = g_NV.index_select(1, ids_R)
        grad_x = grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(g_NV, weight_VH).addmm_(g_NR, replaced(weight_VH, rows_RH, ids_R)).view_as(x)
        if ctx.needs_input_grad[2]:
            grad_rows = g_NR.t() @ x_NH
        return grad_x, None, grad_rows, None


def replaced(weight_VH, rows_RH, ids_R):
    """Return (R, H): what the rows have that the frozen ones in their place have not."""
    return rows_RH - weight_VH.index_select(0, ids_R)


def parts(head):
    """Return (weight (V, H), rows (R, H), ids (R)) of a head with rows of new tokens, (weight, None, None) of a plain one."""
    rows = getattr(getattr(head, "token_adapter", None), "rows", None)
    if rows is None:
        return head.weight, None, None
    return head.token_adapter.base_layer.weight, rows, head.token_adapter.ids
