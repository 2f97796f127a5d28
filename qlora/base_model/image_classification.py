"""The task image-classification: ViT, DeiT, Swin and others under a head that gives each class of an image a logit.

The names are those of text_generation.py. There is no tokenizer: an image processor makes pixel_values (B, channels, height,
width) of images (image_processor.py). Logits are (B, C); the label of a row is the number of its class.
"""

from __future__ import annotations

import torch

from ..system import memory
from ..system.errors import InputError
from . import image_processor, quantized
from .classification import (
    begin_head,
    has_labels,
    head_names,
    is_of_another_head,
    is_of_head,
    labels_of,
    settle,
)
from .classification import written_to_config as of_classes
from .messages import said

__all__ = ["begin_head", "has_labels", "head_names", "is_of_another_head", "is_of_head", "labels_of"]

# PEFT has no name for it, and takes any model then as it is called
NAME, PEFT_TYPE, CLASS = "image-classification", None, "ForImageClassification"
HAS_CLASSES, HAS_TOKENS = True, False


def kept_names(model):
    """Return the names of the modules that stay as they are: the head, and what makes Swin v2's position biases."""
    biases = [name for name, _ in model.named_modules() if name.endswith("position_bias_mlp")]
    return [*head_names(model), *biases]


def auto_name(multimodal=False):
    """Return the name of transformers' class that opens a folder for this task."""
    return "AutoModelForImageClassification"


def auto_class(multimodal=False):
    """Return the class of that name."""
    import transformers

    return getattr(transformers, auto_name())


def settle_config(config, task, checkpoint, pad_token_id=None):
    """Make a config that was read from a folder that of a classifier, in place: its class and the classes.

    Raises InputError where transformers has no classifier of this architecture.
    """
    settle(config, task, checkpoint, auto_class(), CLASS)


def written_to_config(config):
    """Return what of the classes belongs into config.json, {key: value}; there is no pad token."""
    return {key: value for key, value in of_classes(config).items() if key != "pad_token_id"}


def accept_arguments(model):
    """Return the model: transformers' classifiers are called alike."""
    return model


@torch.no_grad()
def refuse_unsuitable(model, checkpoint):
    """Raise InputError for what would fail, or go wrong in silence, only once it trains.

    Batch normalization: its running statistics change with every step, also of a frozen layer, and are no parameters. A model
    that cannot compute in its dtype: it is tried with one image.
    """
    if any(isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)) for module in model.modules()):
        raise InputError(
            f"{checkpoint.folder}: {type(model).__name__} has batch normalization, whose running statistics would change beside "
            "what is trained; take a model without it, such as ViT, DeiT or Swin"
        )
    shape, dtype = image_processor.shape_of(model.config), quantized.floating_dtype(model)
    if shape is None:
        return
    try:
        model(pixel_values=torch.zeros(1, *shape, dtype=dtype, device=model.device))
    except (RuntimeError, ValueError) as error:
        if memory.is_refusal(error):
            raise
        raise InputError(
            f"{checkpoint.folder}: {type(model).__name__} does not compute in {str(dtype)[6:]}: {said(error)}; set "
            "quantization.compute_dtype=float32, or with quantization: null model.dtype=float32"
        ) from None
