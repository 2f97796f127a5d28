"""The task text-classification: an encoder or a decoder under a head that gives each class of a text, or a pair, a logit.

The names are those of text_generation.py. Logits are (B, C), of the first token of an encoder and of the last one of a decoder;
the label of a row is the number of its class.
"""

from __future__ import annotations

from .classification import (
    begin_head,
    has_labels,
    head_names,
    is_of_another_head,
    is_of_head,
    labels_of,
    settle,
    written_to_config,
)

__all__ = [
    "begin_head",
    "has_labels",
    "head_names",
    "is_of_another_head",
    "is_of_head",
    "labels_of",
    "written_to_config",
]

NAME, PEFT_TYPE, CLASS = "text-classification", "SEQ_CLS", "ForSequenceClassification"
HAS_CLASSES, HAS_TOKENS = True, True
kept_names = head_names


def auto_name(multimodal=False):
    """Return the name of transformers' class that opens a folder for this task."""
    return "AutoModelForSequenceClassification"


def auto_class(multimodal=False):
    """Return the class of that name."""
    import transformers

    return getattr(transformers, auto_name())


def is_decoder(config):
    """True if the logits are those of a text's last token: with padding, the model must know its pad token."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return (
        type(config) in AutoModelForCausalLM._model_mapping and type(config) not in AutoModelForMaskedLM._model_mapping
    )


def settle_config(config, task, checkpoint, pad_token_id=None):
    """Make a config that was read from a folder that of a classifier, in place: its class, the classes, the pad token.

    pad_token_id: of the tokenizer. Raises InputError where transformers has no classifier of this architecture.
    """
    settle(config, task, checkpoint, auto_class(), CLASS)
    if pad_token_id is not None and (config.pad_token_id is None or is_decoder(config)):
        config.pad_token_id = pad_token_id


def accept_arguments(model):
    """Return the model: transformers' classifiers are called alike."""
    return model


def refuse_unsuitable(model, checkpoint):
    """Nothing is refused: an encoder's logits may depend on every token."""
