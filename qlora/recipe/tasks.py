"""What the recipe's task decides of its other fields: defaults that suit it, and what it does not have."""

from __future__ import annotations

GENERATION, IMAGES = "text-generation", "image-classification"

# of a task with classes, where the recipe does not say: a step is a micro-batch of rows of like length
_TRAINING_OF_CLASSES = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "tokens_per_micro_batch": None,
    "group_by_length": True,
}
_OF_CLASSES = ("labels", "class_weights")
_TRAINING_OF_IMAGES = {**_TRAINING_OF_CLASSES, "group_by_length": False}  # they are alike
# fields of `data` that say how conversations become tokens
_OF_CONVERSATIONS = ("packing", "train_on", "thoughts", "chat_template", "system_as_user")


def has_classes(task):
    """True if the answer of this task is a class, not words."""
    return task != GENERATION


def with_defaults(values):
    """Return the values of a recipe with the defaults that its task has other than text-generation."""
    if not isinstance(values, dict) or not has_classes(values.get("task", GENERATION)):
        return values
    training, own = (
        values.get("training", {}),
        _TRAINING_OF_IMAGES if values["task"] == IMAGES else _TRAINING_OF_CLASSES,
    )
    return {**values, "training": {**own, **training}} if isinstance(training, dict) else values


def refuse(recipe):
    """Raise ValueError for fields of a recipe that mean nothing for its task."""
    task, data = recipe.task, recipe.data
    if not has_classes(task):
        _refuse_set(task, data, "data", _OF_CLASSES)
        if recipe.training.metric_for_best_model == "eval_accuracy":
            raise ValueError(
                "training.metric_for_best_model eval_accuracy is for a task with classes; take eval_loss with text-generation"
            )
        return
    _refuse_set(task, data, "data", _OF_CONVERSATIONS)
    _refuse_set(task, recipe.training, "training", ("num_samples",))
    if recipe.training.tokens_per_micro_batch is not None:
        raise ValueError(f"training.tokens_per_micro_batch is for text-generation; leave it out with task {task}")
    _refuse_set(task, recipe.model, "model", ("new_tokens",))
    if task == IMAGES:
        _refuse_of_tokens(recipe)
    if data.overlong not in ("error", "drop", "truncate"):
        raise ValueError(
            f"data.overlong {data.overlong} is for conversations; task {task} has error, drop and truncate"
        )
    if any(source.format != "auto" for source in [*data.train, *(data.eval or [])]):
        raise ValueError(
            f"data: format is for conversations; rows of task {task} have columns, which data.columns names"
        )
    if recipe.export.verify == "layers":
        raise ValueError(
            f"export.verify layers is for text-generation; task {task} has full, which holds both models in memory"
        )
    start = recipe.lora and recipe.lora.init_lora_weights
    if start in ("corda", "lora_ga"):
        raise ValueError(f"lora.init_lora_weights {start} is for text-generation: it reads conversations; leave it out")
    method = recipe.method
    if not method.trains_a_head:
        raise ValueError(f"{method.key} is for text-generation: it does not train a head for classes; take lora")
    unknown = (
        sorted(set(data.class_weights) - set(data.labels))
        if isinstance(data.class_weights, dict) and data.labels
        else []
    )
    if unknown:
        raise ValueError(f"data.class_weights: {', '.join(unknown)} is not in data.labels ({', '.join(data.labels)})")


def _refuse_of_tokens(recipe):
    """Raise ValueError for fields that mean nothing for images, which are no tokens."""
    _refuse_set(recipe.task, recipe.data, "data", ("max_length", "overlong"))
    _refuse_set(recipe.task, recipe.training, "training", ("neftune_noise_alpha", "group_by_length"))
    if recipe.lora is not None and recipe.lora.init_lora_weights == "eva":
        raise ValueError(f"lora.init_lora_weights eva reads rows of tokens; leave it out with task {recipe.task}")
    if any(source.sample_by != "document" for source in [*recipe.data.train, *(recipe.data.eval or [])]):
        raise ValueError(
            f"data: sample_by is for .txt files; task {recipe.task} has folders of images and tables of paths"
        )


def _refuse_set(task, section, name, fields):
    """Raise ValueError if one of these fields has another value than its default."""
    for field in fields:
        if getattr(section, field) != type(section).model_fields[field].default:
            owner = "a task with classes, such as text-classification" if field in _OF_CLASSES else "text-generation"
            raise ValueError(f"{name}.{field} is for {owner}; leave it out with task {task}")
