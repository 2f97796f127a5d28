"""The task image-classification: ViT, DeiT, Swin and others under a head that gives each class of an image a logit.

The names are those of text_generation.py. There is no tokenizer: an image processor makes pixel_values (B, channels, height,
width) of images (image_processor.py). Logits are (B, C); the label of a row is the number of its class.
"""

from __future__ import annotations

from ..system.errors import InputError
from .classification import (
    begin_head,
    has_labels,
    head_names,
    is_of_another_head,
    is_of_head,
    labels_of,
    refuse_other_problem,
    set_labels,
)
from .classification import written_to_config as of_classes

__all__ = ["begin_head", "has_labels", "head_names", "is_of_another_head", "is_of_head", "labels_of"]

# PEFT has no name for it, and takes any model then as it is called
NAME, PEFT_TYPE, CLASS = "image-classification", None, "ForImageClassification"
HAS_CLASSES, HAS_TOKENS = True, False


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
    path = checkpoint.folder / "config.json"
    if type(config) not in auto_class()._model_mapping:
        raise InputError(f"{path}: transformers has no {CLASS} for {config.model_type!r}; take another model")
    refuse_other_problem(config, path)
    found = auto_class()._model_mapping[type(config)]
    # of DeiT the first: the second has a head for a teacher too, and cannot be trained
    config.architectures = [(found[0] if isinstance(found, tuple) else found).__name__]
    if task.labels:
        set_labels(config, task.labels)


def written_to_config(config):
    """Return what of the classes belongs into config.json, {key: value}; there is no pad token."""
    return {key: value for key, value in of_classes(config).items() if key != "pad_token_id"}


def accept_arguments(model):
    """Return the model: transformers' classifiers are called alike."""
    return model


def refuse_unsuitable(model, checkpoint):
    """Nothing is refused: logits may depend on every pixel."""
