"""Cross entropy straight from hidden states, a few positions at a time: the logits of a whole batch are never in memory.

The gradient of the hidden states is computed along with the loss, while the logits are at hand: softmax minus one-hot,
through the head. The idea is that of Cut Cross-Entropy (arXiv:2411.09009) and Liger (arXiv:2410.10989).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from . import token_rows

# N positions, H hidden_size, V vocabulary, R rows of new tokens

POSITIONS = 64  # whose logits fit a core's share of the cache better than more of them: 12 MiB for 49,152 tokens


class _CrossEntropy(torch.autograd.Function):
    """The summed cross entropy, float32, of (N, H) hidden states under a frozen head (V, H) for targets (N).

    rows: (R, H), which are trained, in place of the head's rows `ids` (R); both None for none.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, rows_RH, ids_R):
        wants = hidden_NH.requires_grad
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        grad_NH = torch.empty_like(hidden_NH) if wants else None
        raw = hidden_NH.new_empty(min(POSITIONS, len(hidden_NH)), len(weight_VH))
        scores = raw.new_empty(raw.shape, dtype=torch.float32)
        rows = None if rows_RH is None else _Rows(weight_VH, rows_RH, ids_R)
        for piece in pieces(len(hidden_NH)):
            part, targets = hidden_NH[piece], targets_N[piece, None]
            count = len(part)
            logits, p = raw[:count], scores[:count]
            torch.mm(part, weight_VH.t(), out=logits)
            if rows is not None:
                rows.give_logits(logits, part)
            p.copy_(logits)
            p.sub_(p.amax(-1, keepdim=True))
            target_scores = p.gather(1, targets)
            sums = p.exp_().sum(-1, keepdim=True)
            total += (sums.log() - target_scores).sum()
            if grad_NH is not None:
                p.div_(sums).scatter_add_(1, targets, p.new_full((count, 1), -1.0))
                logits.copy_(p)
                torch.mm(logits, weight_VH, out=grad_NH[piece])
                if rows is not None:
                    rows.take_gradient(p, part, grad_NH[piece])
        ctx.save_for_backward(grad_NH, None if rows is None else rows.gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_NH, grad_RH = ctx.saved_tensors
        grad_rows = None if grad_RH is None else grad_RH.mul_(grad).to(grad_NH.dtype)
        return grad_NH.mul_(grad), None, None, grad_rows, None


class _Rows:
    """Rows of new tokens in the loss, piece by piece. gradient: theirs, (R, H), summed in float32."""

    def __init__(self, weight_VH, rows_RH, ids_R):
        self.rows_RH, self.ids_R = rows_RH, ids_R
        self.replaced_RH = token_rows.replaced(weight_VH, rows_RH, ids_R)
        self.gradient = torch.zeros_like(rows_RH, dtype=torch.float32)

    def give_logits(self, logits_NV, hidden_NH):
        logits_NV.index_copy_(1, self.ids_R, hidden_NH @ self.rows_RH.t())

    def take_gradient(self, p_NV, hidden_NH, grad_NH):
        """p_NV: the gradient of the logits, float32."""
        p_NR = p_NV.index_select(1, self.ids_R)
        self.gradient.addmm_(p_NR.t(), hidden_NH.float())
        grad_NH.addmm_(p_NR.to(grad_NH.dtype), self.replaced_RH)


def pieces(num_positions):
    """Return slices of at most POSITIONS positions."""
    return [slice(start, start + POSITIONS) for start in range(0, num_positions, POSITIONS)]


def takes(model):
    """Return whether this model's loss is the cross entropy of decoder and frozen head, but for rows of new tokens, and nothing
    in between."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    plain = head if token_rows.parts(head)[1] is None else head.token_adapter.base_layer
    between = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_scale", "logits_scaling")
    return (
        type(plain) is torch.nn.Linear
        and plain.bias is None
        and not plain.weight.requires_grad
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
    weight_VH, rows_RH, ids_R = token_rows.parts(head)
    return _CrossEntropy.apply(hidden_NH.to(weight_VH.dtype), weight_VH, targets_N, rows_RH, ids_R)
