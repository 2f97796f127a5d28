"""What tasks with classes have in common: names of classes in config.json, and a head that makes a logit of each.

The head is all that stands behind the layers: BERT's pooler and classifier, the `score` of a decoder. It is never quantized, is
no target of "all linear layers", and is trained whole, whatever the method (methods/targets.py). A base model's files have none
of the right shape, so it starts with random numbers; that of a classifier with the same classes goes on.
"""

from __future__ import annotations

import torch

from ..system.errors import InputError

_POOLERS = ("pooler",)  # of the base model, and behind its layers


def head_names(model):
    """Return the names of the modules that make the logits of what the layers compute."""
    prefix = model.base_model_prefix
    found = [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]
    body = getattr(model, prefix, None)
    inside = [] if body is None else [name for name, _ in body.named_children() if name in _POOLERS]
    return [*(f"{prefix}.{name}" for name in inside if any(True for _ in getattr(body, name).parameters())), *found]


def is_of_head(model, name):
    """True if `name` is that of a parameter of the head."""
    return any(name.startswith(f"{one}.") for one in head_names(model))


def is_of_another_head(model, name):
    """True if tensor `name` of the files is of a head for something else, such as lm_head or a pooler that is not used."""
    body = f"{model.base_model_prefix}."
    parts = name.removeprefix(body).split(".")
    known = {key.removeprefix(body).split(".")[0] for key in model.state_dict() if key.startswith(body)}
    return parts[0] not in known


def begin_head(model, missing, seed):
    """Give the parameters `missing` of the head the numbers that it starts with, in place: the same for the same seed.

    Matrices are normal with the config's initializer_range, norms 1 and biases 0.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(missing):
            parameter = parameters[name]
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def settle(config, task, checkpoint, auto_class, kind):
    """Make a config that was read from a folder that of a classifier, in place: its class, and the classes that the task names.

    auto_class: transformers' class that opens such folders; kind: what its classes are called, such as ForImageClassification.

    Raises:
        InputError: transformers has none of this architecture, or the model gives a row several classes.
    """
    path = checkpoint.folder / "config.json"
    if type(config) not in auto_class._model_mapping:
        raise InputError(f"{path}: transformers has no {kind} for {config.model_type!r}; take another model")
    refuse_other_problem(config, path)
    found = auto_class._model_mapping[type(config)]
    # of DeiT the first: the second has a head for a teacher too, and cannot be trained
    config.architectures = [(found[0] if isinstance(found, tuple) else found).__name__]
    if task.labels:
        set_labels(config, task.labels)


def has_labels(config, labels):
    """True if the classes in a config, as its file has them, are these labels: a head in the files is one for them."""
    named = config.id2label
    return len(named) == len(labels) and all(
        str(named.get(number)) in (label, f"LABEL_{number}" if label == str(number) else label)
        for number, label in enumerate(labels)
    )


def set_labels(config, labels):
    """Write the names of the classes into a config, in place."""
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"


def labels_of(config):
    """Return the names of the classes of a config, in the order of the logits."""
    return tuple(str(config.id2label[number]) for number in sorted(config.id2label))


def refuse_other_problem(config, path):
    """Raise InputError where config.json is of a model that gives a row several classes, or a number."""
    kind = getattr(config, "problem_type", None)
    if kind not in (None, "single_label_classification"):
        raise InputError(
            f"{path}: problem_type is {kind}; only single_label_classification is supported, where a row has one class"
        )


def written_to_config(config):
    """Return what of the classes belongs into config.json, {key: value}."""
    numbered = config.id2label
    return {
        "architectures": list(config.architectures),
        "id2label": {str(number): label for number, label in numbered.items()},
        "label2id": dict(config.label2id),
        "problem_type": config.problem_type,
        "pad_token_id": getattr(config, "pad_token_id", None),
    }
