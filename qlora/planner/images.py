"""What of a plan is other for images: levels grow with their number alone, as all are of the size that the model takes."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from .. import base_model

NUMBERS = (2, 3)  # of images to run at: there is one term beside what does not grow
_USUAL = (3, 224, 224)  # of an image, where config.json does not say


def loss(peft_model, num_images, num_scored):
    """What classification.Classification computes of a micro-batch of images, on the meta device."""
    logits = peft_model(pixel_values=_pixels(peft_model.get_base_model(), num_images)).logits.float()
    return F.cross_entropy(logits, torch.zeros(num_images, dtype=torch.int64, device="meta"), reduction="sum")


def fitted(runs, num_terms):
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


def positions(model):
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
