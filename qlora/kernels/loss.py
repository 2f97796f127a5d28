"""Cross entropy straight from hidden states, some positions at a time: the logits of a whole batch are never in memory.

The gradient of the hidden states is computed along with the loss, while the logits are at hand: softmax minus one-hot,
through the head. The idea is that of Cut Cross-Entropy (arXiv:2411.09009) and Liger (arXiv:2410.10989).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from . import token_rows

# N positions, H hidden_size, V vocabulary, R rows of new tokens

POSITIONS = 64  # whose logits fit a core's share of the cache better than more of them: 12 MiB for 49,152 tokens
# trl 1.16 has logits of so many positions and tokens in memory on a GPU: we have no more bytes of them, but for POSITIONS
TRLS_BUFFER = 4096, 32768


class _CrossEntropy(torch.autograd.Function):
    """The summed cross entropy, float32, of (N, H) hidden states under a frozen head (V, H) for targets (N).

    rows: (R, H), which are trained, in place of the head's rows `ids` (R); both None for none.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, rows_RH, ids_R):
        wants = hidden_NH.requires_grad
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        grad_NH = torch.empty_like(hidden_NH) if wants else None
        N, V = len(hidden_NH), len(weight_VH)
        size = at_once(N, V, hidden_NH.element_size(), hidden_NH.device.type)
        raw = hidden_NH.new_empty(min(size, N), V)
        scores = raw.new_empty(raw.shape, dtype=torch.float32)
        rows = None if rows_RH is None else _Rows(weight_VH, rows_RH, ids_R)
        for piece in pieces(N, size):
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


def pieces(num_positions, size):
    """Return slices of at most `size` positions."""
    return [slice(start, start + size) for start in range(0, num_positions, size)]


def at_once(num_positions, vocab_size, element_size, device_type):
    """Return how many positions have their logits in memory at a time: in the dtype of the hidden states and in float32.

    On a GPU as many as take the bytes that trl's do, which have one dtype and a part of the vocabulary: a tenth to a half of
    what it has at a time. element_size: bytes of a hidden number.
    """
    if device_type == "cpu":
        return POSITIONS
    most, tokens = TRLS_BUFFER
    trls_bytes = min(num_positions, most) * tokens * element_size
    return max(1, min(num_positions, max(POSITIONS, trls_bytes // (vocab_size * (element_size + 4)))))


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


def is_behind_virtual_tokens(peft_model):
    """Return whether the method puts something before each row, so that its positions are not the model's."""
    return getattr(getattr(peft_model, "active_peft_config", None), "is_prompt_learning", False)


def is_left_to_trl(peft_model, taken, device_kind):
    """Return whether a model's loss is trl's: experts have one for their balance beside it. On a GPU it also is where `taken`
    by nothing here: trl never has the logits of all positions in memory. Rows of new tokens it cannot train, and behind virtual
    tokens it takes the wrong positions."""
    if is_behind_virtual_tokens(peft_model):
        return False
    model = peft_model.get_base_model()
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0.0) != 0.0:
        return True
    return device_kind != "cpu" and not taken and token_rows.parts(model.get_output_embeddings())[1] is None


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
