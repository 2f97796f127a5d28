"""What a method is. Each is a file of this package, NAME.py for the section NAME of the recipe, with the functions of `Method`.

The others ask for no name of a method: the trainer gets a `Trainable`, the merge an adapter.Adapter whose updates know what
they do to a weight. A new method is a file here and its section in the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch

# O out_features, I in_features


class Method(Protocol):
    """The functions that a method's file has, with these arguments."""

    @staticmethod
    def attach(model, section, seed=0, token_ids=(), checkpoint=None, examples=()):
        """Return `model` with what the method trains in it, in the model's own floating dtype; nothing else requires gradients.

        section: of the recipe. seed: of the random numbers it starts from. token_ids: tokens whose rows in embedding and head
        are trained too; they start as the model has them. checkpoint: where the model's 16-bit weights are; examples: what is
        trained on; for starts that need them. A model on the meta device gets the same shapes, without numbers.

        Raises:
            InputError: a name or pattern that matches nothing, with the names that exist; or what cannot be trained.
        """

    @staticmethod
    def trainable(model, section):
        """Return the Trainable of a model that `attach` has made."""

    @staticmethod
    def save(model, folder, base_name, revision):
        """Write a folder whose adapter_config.json has NAME in capitals as peft_type, which `read` and `load` read again.

        Raises:
            TrainingFailed: a number is not finite; before anything is written.
        """

    @staticmethod
    def load(model, adapter, token_ids=()):
        """Return `model` with an Adapter that `read` returned, frozen, in eval mode; `disable_adapter()` gives the base.

        token_ids: the tokens whose rows were trained.

        Raises:
            InputError: anything in the folder finds no place in the model, or the other way round.
        """

    @staticmethod
    def fill(model, adapter, ends=()):
        """Give a model that `attach` has made the numbers of an Adapter, to train them further.

        Raises:
            InputError: anything in the folder finds no place in the model, or the other way round; or it cannot go on.
        """

    @staticmethod
    def read(folder, config):
        """Return the Adapter in a folder whose files are whole; config: what its adapter_config.json says.

        What a merge cannot express says so in Adapter.unmergeable.

        Raises:
            InputError: a setting that is not followed; tensors without a partner, of wrong shapes or not finite.
        """

    @staticmethod
    def describe(config):
        """Return the Description of a folder whose adapter_config.json says this."""


@dataclass(frozen=True)
class Group:
    """Parameters that the optimizer treats alike, by name.

    learning_rate: times training.learning_rate. weight_decay: None for training.weight_decay.
    """

    names: tuple
    learning_rate: float = 1.0
    weight_decay: float | None = None


class Schedule:
    """What changes while training beside the steps of the optimizer; here nothing does.

    changes: False saves the trainer the calls of `penalty` and `after_step`.
    """

    changes = False

    def begin(self, total_steps):
        """Learn the number of steps, before the first one.

        Raises:
            InputError: they do not go with the section of the recipe.
        """

    def penalty(self, named_parameters) -> torch.Tensor:
        """Return what is added to the loss of each step; named_parameters: pairs of name and float32 master."""
        raise NotImplementedError

    def after_step(self, step):
        """Change the model after optimizer step `step` (1, 2, ...), which holds the new weights, and their gradients."""

    def state(self):
        """Return (tensors, {name: tensor}; plain values, as JSON takes them) that a checkpoint keeps."""
        return {}, None

    def restore(self, tensors, values):
        """Go on from a `state`."""

    def measured(self):
        """Return {name: number} for each logged step."""
        return {}


@dataclass(frozen=True)
class Trainable:
    """What a trainer is to know of a model with a method in it.

    summary: what is trained, in words. first_to_move: {name: parameter} of what gets a gradient in the first step. groups:
    of all that requires gradients. held: {name: index} of numbers in parameters that stay as they are: zero gradients alone
    do not see to that, because 8-bit optimizers round a zero to something else where larger numbers share its block
    (bitsandbytes 0.50.2). schedule: what changes beside.
    """

    summary: str
    first_to_move: dict
    groups: tuple
    held: dict = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)

    @property
    def names(self):
        """Return the names of all that is trained, in the optimizer's order."""
        return [name for group in self.groups for name in group.names]

    def optimizer_groups(self, tensors, learning_rate, weight_decay):
        """Return the groups as torch.optim takes them; tensors: {name: what the optimizer changes} of all or some, with these
        defaults."""
        return [
            {
                "params": [tensors[name] for name in group.names if name in tensors],
                "lr": group.learning_rate * learning_rate,
                "weight_decay": weight_decay if group.weight_decay is None else group.weight_decay,
            }
            for group in self.groups
        ]


def one_group(model):
    """Return the groups of a method that trains all its parameters alike."""
    return (Group(tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)),)


class Update:
    """What a method does to one weight (O, I), and to the bias (O,) beside it."""

    zero: ClassVar[str]  # in words: what has not moved where `is_zero`

    @property
    def shape(self):
        """(O, I) of the weight that it fits; None for a side that may have any length."""
        raise NotImplementedError

    @property
    def num_parameters(self):
        """How many numbers it is made of."""
        raise NotImplementedError

    def merged(self, base_OI, rows=slice(None)):
        """Return `rows` of the merged weight, float32, for those rows of the base."""
        raise NotImplementedError

    def merged_bias(self, base_O):
        """Return the merged bias, float32; here the base's."""
        return base_O

    def is_zero(self):
        """True if it leaves every weight as it is, but for what float32 sums leave: it was never trained."""
        raise NotImplementedError


@dataclass(frozen=True)
class Description:
    """An adapter in words, for lists and model cards.

    kind: as the field calls it. size: such as r=16. formula: what takes the place of the weight {W}. peft: PEFT loads it too.
    """

    kind: str
    size: str
    formula: str = "{W}"
    peft: bool = True
