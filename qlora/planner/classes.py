"""What of a plan is other for tasks with classes: the loss of a row, and attention in padded rows.

And for images: levels grow with their number alone, as all are of the size that the model takes.
"""

from __future__ import annotations

import inspect

import numpy as np
import torch
from torch.nn import functional as F

from .. import base_model

IMAGES = (2, 3)  # to run at: there is one term beside what does not grow
_USUAL = (3, 224, 224)  # of an image, where config.json does not say


def loss_of_a_row(peft_model, num_tokens, num_scored):
    """What classification.Classification computes of one row; further rows add tokens, and a few logits."""
    ids, mask, zeros = [_zeros(1, num_tokens) for _ in range(3)]
    takes = inspect.signature(type(peft_model.get_base_model()).forward).parameters
    # given, because those that a model has itself end at its last position
    more = {name: zeros for name in ("position_ids", "token_type_ids") if name in takes}
    logits = peft_model(input_ids=ids, attention_mask=mask, **more).logits.float()
    return F.cross_entropy(logits, _zeros(1), reduction="sum")


def way_of_padded_attention(device_kind, document, flash):
    """Return an attention function for several rows of `document` tokens with a mask: keys and values are repeated for grouped
    queries, and on a CPU dropout makes torch compute all scores. flash: trace._Flash.apply."""

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


def loss_of_images(peft_model, num_images, num_scored):
    """What classification.Classification computes of a micro-batch of images, on the meta device."""
    logits = peft_model(pixel_values=_pixels(peft_model.get_base_model(), num_images)).logits.float()
    return F.cross_entropy(logits, _zeros(num_images), reduction="sum")


def _zeros(*shape):
    return torch.zeros(*shape, dtype=torch.int64, device="meta")


def fitted_to_images(runs, num_terms):
    """Return {segment: levels (events, num_terms)} from {number of images: {segment: levels}}.

    The first term is what does not grow, the second what does with the number of images, each of which counts as a token.
    """
    (one, first), (other, second) = runs.items()
    found = {}
    for name, low in first.items():
        assert len(low) == len(second[name]), f"{name} allocates other tensors for more images"
        each = (second[name] - low) / (other - one)
        found[name] = np.zeros((len(low), num_terms))
        found[name][:, 0], found[name][:, 1] = low - one * each, each
    return found


def positions_of_an_image(model):
    """Return how many positions of an image a weight of the model's linear layers meets, in the mean over all weights."""
    met = [0, 0]

    def count(module, args):
        numbers = base_model.numel(module.weight)
        met[0] += numbers * args[0][..., 0].numel()
        met[1] += numbers

    layers = [model.get_submodule(name) for name in base_model.linear_names(model)]
    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            model(pixel_values=_pixels(model, 1))
    finally:
        for handle in handles:
            handle.remove()
    return met[0] / met[1]


def _pixels(model, num_images):
    shape = base_model.image_processor.shape_of(model.config) or _USUAL
    return torch.zeros(num_images, *shape, dtype=base_model.floating_dtype(model), device="meta")
