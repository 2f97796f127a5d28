"""What a recipe's task decides: which kind of examples its rows become, what the loss is, and the classes that there are.

All that asks for the name of a task is here and in the task's own file in base_model/.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect

import numpy as np

from ... import base_model, data
from ...base_model import text_generation
from ...exporter import class_proof, proof
from ...runs.folder import RunDir
from ...system.errors import InputError
from ...system.events import note

_ENCODERS = {
    "text-generation": data.Supervised,
    "text-classification": data.LabelledText,
    "image-classification": data.LabelledImages,
}


def task_of(recipe) -> base_model.Task:
    """Return the Task that a recipe asks for."""
    return base_model.Task(recipe.task, tuple(recipe.data.labels or ()), recipe.training.seed)


def encoder_of(task, objective=None):
    """Return what makes examples of rows for a task of this name and the recipe's section of an objective, see data.encoder."""
    if objective is None:
        return _ENCODERS[task]
    return data.UnpairedPreferences if objective.are_unpaired else data.Preferences


def settle_labels(recipe, checkpoint):
    """Return (recipe, checkpoint) with the names of the classes, where the task has some.

    They are those of the recipe, of a model that is a classifier of them already, or of the training rows. The run folder keeps
    them, and every later verb reads them there.

    Raises:
        InputError: there is one class, or what the rows have are no classes.
    """
    if not checkpoint.task.file.HAS_CLASSES:
        return recipe, checkpoint
    labels = recipe.data.labels
    if labels is None:
        labels = data.labels.found(recipe.data.train, recipe.data, encoder_of(recipe.task).open_source)
        start = recipe.model.adapter_name_or_path
        of_run = RunDir(start).recipe().data.labels if start is not None and RunDir.is_run(start) else None
        own = of_run or base_model.own_labels(checkpoint, recipe.model)
        if own and set(labels) <= set(own) and list(own) != labels:
            note(f"classes   of the model: {', '.join(own)}, and the training rows have {', '.join(labels)}")
            labels = list(own)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"labels": labels})})
    return recipe, dataclasses.replace(checkpoint, task=task_of(recipe))


def proof_of(task):
    """Return the file of exporter/ that proves an export for a task, a file of base_model/."""
    return class_proof if task.HAS_CLASSES else proof


def objective_of(prepared, model, installed, planned, parts=1):
    """Return the objective of Prepared data for a model to train; None for the supervised one, which training makes itself.

    installed: kernels.Installed. planned: planned_training.Planned. parts: into so many joined rows are
    cut at least.
    """
    section = prepared.recipe.objective
    if section is not None:
        from ...training.objectives.preference import Preference
        from ...training.objectives.unpaired import UnpairedPreference

        tokens = planned.tokens_per_micro_batch if installed.joined else None
        kind = UnpairedPreference if section.are_unpaired else Preference
        return kind(section, prepared.tokenizer.pad_token_id, installed.joined, installed.loss, tokens, parts)
    if not prepared.checkpoint.task.file.HAS_CLASSES:
        return None
    from ...training.objectives.classification import Classification  # with trl, which `data` and `plan` do without

    weights = class_weights_of(prepared.recipe.data, prepared.examples)
    return Classification(pad_of(prepared.tokenizer, model), weights)


def class_weights_of(section, examples):
    """Return the weight of each class in the loss, by the recipe's section data and the training rows (data.labels.weights)."""
    counts = np.bincount(examples.numbers(data.labels.COLUMN), minlength=len(section.labels)).tolist()
    return data.labels.weights(section.class_weights, counts, section.labels)


def pad_of(tokenizer, model):
    """Return what makes a batch of examples for a model with classes: token_type_ids where tokenizer and forward have them.

    tokenizer: or image processor.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not base_model.task_of(model).HAS_TOKENS:
        return data.Pixels(
            functools.partial(base_model.pixel_values, tokenizer, dtype=base_model.floating_dtype(model))
        )
    takes = inspect.signature(type(model).forward).parameters
    return data.Pad(tokenizer, "token_type_ids" in takes and "token_type_ids" in tokenizer.model_input_names)


def refuse_classes(task, what, instead=""):
    """Raise InputError where the answers of a task (a file of base_model/) are classes, and `what` is for words."""
    if task.HAS_CLASSES:
        raise InputError(f"{what} is for {text_generation.NAME}, and this is a model for {task.NAME}{instead}")


def refuse_images(task, what):
    """Raise InputError where a task (a file of base_model/) reads images, and `what` is words."""
    if not task.HAS_TOKENS:
        how = f'; export the run, and classify images with transformers: pipeline("{task.NAME}", FOLDER)("image.jpg")'
        raise InputError(f"{what} is words, and this is a model for {task.NAME}{how}")
