"""A step of rows that are padded and not joined, as trace.py goes through it: those of a model that answers with classes."""

from __future__ import annotations

import inspect

import torch
from torch.nn import functional as F

# C classes, H heads, T tokens of all rows, D head dim


def points(found):
    """Return points of trace.py to run at, with several rows each."""
    return [(tokens, scored, chunk, document // 2, tile) for tokens, scored, chunk, document, tile in found]


def loss(peft_model, num_tokens, num_scored):
    """Return what classification.Classification computes of one row of T tokens; further rows add a few logits (1, C)."""
    ids, mask, zeros = (torch.zeros(1, num_tokens, dtype=torch.int64, device="meta") for _ in range(3))
    takes = inspect.signature(type(peft_model.get_base_model()).forward).parameters
    # given, because those that a model has itself end at its last position
    more = {name: zeros for name in ("position_ids", "token_type_ids") if name in takes}
    logits = peft_model(input_ids=ids, attention_mask=mask, **more).logits.float()
    return F.cross_entropy(logits, zeros[0, :1], reduction="sum")


def way_of_attention(device_kind, document, flash):
    """Return an attention function for several rows of `document` tokens with a mask.

    Keys and values are repeated for grouped queries, and on a CPU dropout makes torch compute all scores. flash(query, key,
    value, scratch, mask): attention without scores, see trace.py.
    """

    def attend(module, query, key, value, attention_mask, dropout=0.0, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (key, value))
        if not dropout or device_kind == "cuda":
            mask = query.new_empty(query.shape[2] * document)  # sdpa makes numbers of it in every layer, and keeps them
            return flash(query, key, value, device_kind == "cuda", mask).transpose(1, 2).contiguous(), None
        rows = [x.unflatten(2, (-1, document)).transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        mask = torch.ones(1, dtype=torch.bool, device="meta").expand(len(rows[0]), 1, document, document)
        found = F.scaled_dot_product_attention(*rows, attn_mask=mask, dropout_p=dropout)
        return found.transpose(1, 2).contiguous().view(1, query.shape[2], query.shape[1], -1), None

    return attend
