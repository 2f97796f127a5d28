"""What a model answers: the task. The recipe chooses it once; from then on the class of the model says it, as in transformers.

`Checkpoint.task` is what the recipe says. `read_config` writes the class into config.architectures, and whoever has a config or
a model asks `of_config` or `of_model` for the task's file.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..system import files
from . import image_classification, text_classification, text_generation

_TASKS = (text_generation, text_classification, image_classification)


@dataclass(frozen=True)
class Task:
    """What a recipe says of its task. labels: names of the classes, in the order of the logits; empty: those of config.json,
    or a task without classes. seed: of the numbers that a new head starts with."""

    name: str = text_generation.NAME
    labels: tuple = ()
    seed: int = 0

    @property
    def file(self):
        """The module of the task."""
        return next(one for one in _TASKS if self.name == one.NAME)


GENERATION = Task()


def of_config(config):
    """Return the file of the task that a transformers config is for, by config.architectures."""
    return _of_class((getattr(config, "architectures", None) or [""])[0])


def of_folder(folder):
    """Return the file of the task that the model in a folder is for, by its config.json."""
    return _of_class((files.read_object(folder / "config.json").get("architectures") or [""])[0])


def of_model(model):
    """Return the file of the task that a plain or PEFT model is for, by its class."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _of_class(type(model).__name__)


def _of_class(name):
    return next((one for one in _TASKS if str(name).endswith(one.CLASS)), text_generation)
