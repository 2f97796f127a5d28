"""The sections that say what the loss is, where it is not that of supervised training: at most one. Fields are named as trl names
them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from . import tasks
from .fields import Number, Section


class Objective(Section):
    """A section that says what the loss is. key: its name in the recipe. learning_rate: where the recipe has none.
    has_reference: the loss is relative to the model as it is when training begins. are_unpaired: a row is one answer with its
    label, as data.unpaired reads it; else a pair of answers."""

    key: ClassVar[str]
    learning_rate: ClassVar[float]
    has_reference: ClassVar[bool] = True
    are_unpaired: ClassVar[bool] = False


# trl's aot and aot_unpaired sort the pairs of a micro-batch: another loss with other micro-batches
Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sft",
    "sigmoid_norm",
]  # fmt: skip
_SMOOTHED = ("robust", "exo_pair")


def _known(value):
    """One message for what would be two, one for each type."""
    named = value if isinstance(value, list) else [value]
    unknown = [name for name in named if name not in get_args(Loss)]
    if unknown or not named:
        raise ValueError(f"should be of {', '.join(get_args(Loss))}, or a list of them")
    return value


class Dpo(Objective):
    key: ClassVar[str] = "dpo"
    learning_rate: ClassVar[float] = 5e-6

    beta: Number = 0.1
    """higher stays nearer to the reference; of ipo it is tau"""
    loss_type: Annotated[Loss | list[Loss], BeforeValidator(_known)] = "sigmoid"
    """sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down, sft, sigmoid_norm; or a list,
    added up: `[sigmoid, sft]` keeps the chosen answers likely"""
    loss_weights: Annotated[list[Number], Field(min_length=1)] | None = None
    """of a list of losses: a weight for each; null: 1"""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """of robust: the share of pairs the wrong way round; of exo_pair: its epsilon, 1e-3 in the paper"""

    @property
    def losses(self):
        """[(name, weight)]"""
        names = self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]
        return list(zip(names, self.loss_weights or [1.0] * len(names), strict=True))

    @model_validator(mode="after")
    def _what_goes_together(self):
        names = self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            raise ValueError(f"loss_weights: {len(self.loss_weights)} of them for {len(names)} of loss_type")
        if self.label_smoothing and not set(names) & set(_SMOOTHED):
            raise ValueError(
                f"label_smoothing is for loss_type {' and '.join(_SMOOTHED)}; leave it out with {names[0]}"
            )
        if "exo_pair" in names and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs a label_smoothing above 0, such as 1e-3")
        return self


class Orpo(Objective):
    key: ClassVar[str] = "orpo"
    learning_rate: ClassVar[float] = 5e-5
    has_reference: ClassVar[bool] = False

    beta: Number = 0.1
    """weight of the odds ratio; lambda in the paper"""


class Kto(Objective):
    key: ClassVar[str] = "kto"
    learning_rate: ClassVar[float] = 5e-6
    are_unpaired: ClassVar[bool] = True

    beta: Number = 0.1
    """higher stays nearer to the reference"""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto: against the distance from the reference, measured in each step; apo_zero_unpaired: without it"""
    desirable_weight: Number = 1.0
    """of good answers in the loss; makes up for unequal numbers"""
    undesirable_weight: Number = 1.0
    """of bad answers"""


def with_defaults(values, objectives):
    """Return the values of a recipe with the learning rate of its objective, where it has none. objectives: {name: its section's
    class}."""
    given = [kind for name, kind in objectives.items() if isinstance(values, dict) and values.get(name) is not None]
    training = values.get("training", {}) if given else None
    if not isinstance(training, dict):
        return values
    return {**values, "training": {"learning_rate": given[0].learning_rate, **training}}


DROPOUTS = ("lora_dropout", "hira_dropout", "module_dropout", "dropout")


def refuse(recipe):
    """Raise ValueError for fields of a recipe that mean nothing for its objective, or go against it."""
    objective, data, training = recipe.objective, recipe.data, recipe.training
    if objective is None:
        return
    key = objective.key
    if tasks.has_classes(recipe.task):
        raise ValueError(f"{key} is for text-generation: answers of task {recipe.task} are classes; leave it out")
    for field, why in (
        ("packing", "the rows of a step are joined without it (training.tokens_per_micro_batch: auto)"),
        ("train_on", "what is trained is the answer that is compared or judged"),
    ):
        if getattr(data, field) != type(data).model_fields[field].default:
            raise ValueError(f"data.{field} is for supervised training; leave it out with {key}: {why}")
    if data.overlong in ("truncate_prompt", "split"):
        raise ValueError(
            f"data.overlong {data.overlong} is for supervised training; {key} has error, drop and truncate"
        )
    if any(source.format != "auto" for source in [*data.train, *(data.eval or [])]):
        raise ValueError(f"data: format is for supervised training; leave it out with {key}")
    if training.filled_to is not None:
        raise ValueError(
            f"training.tokens_per_micro_batch: a number is for supervised training; {key} has auto and null"
        )
    if key == "kto" and objective.loss_type == "kto" and training.rows_per_step < 2:
        raise ValueError(
            "kto measures its distance from the reference on the rows of a step, and a step has one; set "
            "training.gradient_accumulation_steps=16, or kto.loss_type=apo_zero_unpaired"
        )
    if training.neftune_noise_alpha is not None:
        raise ValueError(f"training.neftune_noise_alpha is for supervised training; leave it out with {key}")
    noisy = [name for name in DROPOUTS if getattr(recipe.method, name, 0)]
    if noisy and objective.has_reference:
        raise ValueError(
            f"{recipe.method.key}.{noisy[0]}: {key} compares the model with its reference, which has no dropout; leave it out"
        )
