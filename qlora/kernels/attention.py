"""Attention within documents: a packed row holds several, and none sees another.

The lengths of the documents travel with the batch as `segments`, and each is attended to by itself. No S x S mask is
built, and attention costs the sum of the squares of the lengths instead of the square of the sum.
"""

from __future__ import annotations

import contextlib

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..errors import InputError

NAME = "qlora_segments"

# B batch (1), H heads, T tokens of the packed row, D head dim


def segment_attention(
    module, query_BHTD, key_BHTD, value_BHTD, attention_mask, segments, sliding_window=None, **kwargs
):
    """Return ((B, T, H, D), None): causal attention of each of `segments` (lengths that sum to T) within itself."""
    outputs, start = [], 0
    for length in segments:
        part = slice(start, start + length)
        mask = _band(length, sliding_window, query_BHTD.device) if sliding_window and length > sliding_window else None
        output, _ = sdpa_attention_forward(
            module, query_BHTD[:, :, part], key_BHTD[:, :, part], value_BHTD[:, :, part], mask, **kwargs
        )
        outputs.append(output)
        start += length
    return torch.cat(outputs, dim=1), None


def _band(length, window, device):
    """Return the mask (1, 1, length, length) of causal attention to the last `window` tokens, itself among them."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def refuse_unsupported(config):
    """Raise InputError where documents of a packed row cannot be kept apart in this architecture."""
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise InputError(
            f"data.packing: {', '.join(sorted(kinds))} layers carry state across rows; set data.packing=false"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise InputError("data.packing: this architecture caps its attention logits; set data.packing=false")


@contextlib.contextmanager
def within_documents(model):
    """Attend within documents while the block runs; batches must carry `segments`."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise InputError(
            f"data.packing: {type(model).__name__} does not let its attention be replaced; set data.packing=false"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)
