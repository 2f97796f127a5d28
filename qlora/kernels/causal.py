"""Causal attention on a CPU, a block of queries at a time.

torch's own CPU kernel takes a third of a training step at a thousand tokens. Products of blocks that stay in the cache take
0.7 of its time there, a third of it on short rows, and its gradients of key and value are twice as far from those in float32.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.autograd.function import once_differentiable

# K key heads, G query heads that share one, T tokens, D head dim; b queries of a block, c keys that they see

BLOCK = 128  # queries; of 32 to 256 the fastest from 256 tokens on, and none is faster below


class CausalAttention(torch.autograd.Function):
    """softmax(scale * q k^T) v, (K, G, T, D): each token sees itself and what is before it, at most `window` tokens.

    q (K, G, T, D), k and v (K, T, D). Scores are float32, whatever the inputs are. Kept for the backward pass: q, k and v.
    """

    @staticmethod
    def forward(ctx, q_KGTD, k_KTD, v_KTD, scale, window):
        out_KGTD = torch.empty_like(q_KGTD, memory_format=torch.contiguous_format)
        k32_KTD = k_KTD.float()
        for queries, keys, mask in _blocks(q_KGTD.shape[2], window):
            P_KGbc = _probabilities(q_KGTD[:, :, queries], k32_KTD[:, keys], mask, scale)
            out_KGTD[:, :, queries] = _heads(P_KGbc.to(q_KGTD.dtype), v_KTD[:, keys])
            del P_KGbc  # before the next one is made
        ctx.save_for_backward(q_KGTD, k_KTD, v_KTD)
        ctx.scale, ctx.window = scale, window
        return out_KGTD

    @staticmethod
    @once_differentiable
    def backward(ctx, g_KGTD):
        q_KGTD, k_KTD, v_KTD = ctx.saved_tensors
        k32_KTD = k_KTD.float()
        grad_q = torch.empty_like(q_KGTD, memory_format=torch.contiguous_format)
        grad_k, grad_v = torch.zeros_like(k32_KTD), torch.zeros_like(k32_KTD)
        for queries, keys, mask in _blocks(q_KGTD.shape[2], ctx.window):
            q, g = q_KGTD[:, :, queries], g_KGTD[:, :, queries]
            P = _probabilities(q, k32_KTD[:, keys], mask, ctx.scale)
            grad_v[:, keys] += _together(P.to(g.dtype)).transpose(1, 2) @ _together(g)
            grad_P = _heads(g, v_KTD[:, keys].transpose(1, 2)).float()
            grad_S = torch.ops.aten._softmax_backward_data(grad_P, P, -1, P.dtype)
            del grad_P, P
            grad_S = grad_S.mul_(ctx.scale).to(q.dtype)
            grad_q[:, :, queries] = _heads(grad_S, k_KTD[:, keys])
            grad_k[:, keys] += _together(grad_S).transpose(1, 2) @ _together(q)
            del grad_S
        return grad_q, grad_k.to(k_KTD.dtype), grad_v.to(v_KTD.dtype), None, None


def _blocks(num_tokens, window):
    """Yield (slice of queries, slice of the keys that they see, mask to add to the scores of the last of these keys)."""
    for start in range(0, num_tokens, BLOCK):
        stop = min(start + BLOCK, num_tokens)
        first = max(0, start - window + 1) if window else 0
        mask = _band(stop - start, start - first, window) if window else _triangle(stop - start)
        yield slice(start, stop), slice(first, stop), mask


@functools.lru_cache(maxsize=8)
def _triangle(num_queries):
    """Return (b, b): 0 where a query sees a key of its own block, else -inf."""
    return torch.full((num_queries, num_queries), -math.inf).triu_(1)


def _band(num_queries, num_before, window):
    """Return (b, c): the same with the keys from `num_before` tokens before the block on, of which `window` are seen."""
    seen = within_window(num_queries, num_before, window)
    return torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)


def within_window(num_queries, num_before, window, device=None):
    """Return (b, num_before + b), bool: which keys a query sees, the last `window` up to its own.

    The keys begin `num_before` tokens before the first query.
    """
    queries = torch.arange(num_before, num_before + num_queries, device=device)
    distance = queries[:, None] - torch.arange(num_before + num_queries, device=device)
    return (distance >= 0) & (distance < window)


def _probabilities(q_KGbD, k32_KcD, mask, scale):
    """Return (K, G, b, c) float32."""
    scores = _heads(q_KGbD.float() * scale, k32_KcD.transpose(1, 2))
    scores[..., scores.shape[-1] - mask.shape[-1] :].add_(mask)
    return torch.softmax(scores, -1)


def _together(x_KGbD):
    """Return (K, G * b, D): what heads that share a key multiply is one matrix."""
    return x_KGbD.reshape(len(x_KGbD), -1, x_KGbD.shape[-1])


def _heads(x_KGbD, y_KDE):
    """Return x y, (K, G, b, E)."""
    return (_together(x_KGbD) @ y_KDE).view(*x_KGbD.shape[:3], -1)


def causal_attention(query_HTD, key_KTD, value_KTD, scale, window=None):
    """Return (H, T, D), as torch's scaled_dot_product_attention(is_causal=True, enable_gqa=True) does.

    window: the last tokens that a token sees, itself among them; None: all.
    """
    heads, keys = len(query_HTD), len(key_KTD)
    query_KGTD = query_HTD.reshape(keys, heads // keys, *query_HTD.shape[1:])
    return CausalAttention.apply(query_KGTD, key_KTD, value_KTD, scale, window).view(query_HTD.shape)
