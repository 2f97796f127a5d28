"""Cross entropy straight from hidden states, a few positions at a time: the logits of a whole batch are never in memory.

The gradient of the hidden states is computed along with the loss, while the logits are at hand: softmax minus one-hot,
through the head. The idea is that of Cut Cross-Entropy (arXiv:2411.09009) and Liger (arXiv:2410.10989).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

# N positions, H hidden_size, V vocabulary

POSITIONS = 64  # whose logits fit a core's share of the cache better than more of them: 12 MiB for 49,152 tokens


class _CrossEntropy(torch.autograd.Function):
    """The summed cross entropy, float32, of (N, H) hidden states under a frozen head (V, H) for targets (N)."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N):
        wants = hidden_NH.requires_grad
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        grad_NH = torch.empty_like(hidden_NH) if wants else None
        raw = hidden_NH.new_empty(min(POSITIONS, len(hidden_NH)), len(weight_VH))
        scores = raw.new_empty(raw.shape, dtype=torch.float32)
        for piece in pieces(len(hidden_NH)):
            part, targets = hidden_NH[piece], targets_N[piece, None]
            count = len(part)
            logits, p = raw[:count], scores[:count]
            torch.mm(part, weight_VH.t(), out=logits)
            p.copy_(logits)
            p.sub_(p.amax(-1, keepdim=True))
            target_scores = p.gather(1, targets)
            sums = p.exp_().sum(-1, keepdim=True)
            total += (sums.log() - target_scores).sum()
            if grad_NH is not None:
                p.div_(sums).scatter_add_(1, targets, p.new_full((count, 1), -1.0))
                logits.copy_(p)
                torch.mm(logits, weight_VH, out=grad_NH[piece])
        ctx.save_for_backward(grad_NH)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (grad_NH,) = ctx.saved_tensors
        return grad_NH.mul_(grad), None, None


def pieces(num_positions):
    """Return slices of at most POSITIONS positions."""
    return [slice(start, start + POSITIONS) for start in range(0, num_positions, POSITIONS)]


def takes(model):
    """Return whether this model's loss is the cross entropy of decoder and frozen head, and nothing in between."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    between = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_scale", "logits_scaling")
    return (
        type(head) is torch.nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
        and all(getattr(config, name, None) in (None, 1, 1.0) for name in between)
    )


def hidden_states(model, head, columns, **inputs):
    """Return what `head` would get in a forward pass of `model` at these columns: (B, len(columns), H)."""
    head.forward = lambda hidden: hidden
    try:
        return model(**inputs, use_cache=False, logits_to_keep=columns).logits
    finally:
        del head.forward


def cross_entropy(hidden_NH, head, targets_N):
    """Return the summed cross entropy of targets (N) given hidden states (N, H) and a head without a bias.

    Some models end in float32 and cast to the head's dtype as they call it (Mamba).
    """
    return _CrossEntropy.apply(hidden_NH.to(head.weight.dtype), head.weight, targets_N)
