"""Sections that say what the loss is: at most one, with a learning rate of its own, and what does not go with it is refused."""

import pytest

from qlora.recipe import Recipe
from qlora.system.errors import InputError

REQUIRED = {"model": {"name_or_path": "x"}, "data": {"train": "x"}, "output_dir": "x"}


def recipe(*overrides, **sections):
    return Recipe.from_dict({**REQUIRED, **sections}, overrides)


def test_the_learning_rate_is_that_of_the_objective_unless_it_is_given():
    assert recipe().objective is None
    assert recipe(dpo={}).training.learning_rate == 5e-6
    assert recipe(orpo={}).training.learning_rate == 5e-5
    assert recipe(dpo={}, training={"learning_rate": 1e-4}).training.learning_rate == 1e-4
    again = Recipe.from_dict(recipe(dpo={"loss_type": ["sigmoid", "sft"]}).model_dump())
    assert again.objective.losses == [("sigmoid", 1.0), ("sft", 1.0)]
    assert recipe("dpo.beta=0.3").objective.beta == 0.3


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"dpo": {}, "orpo": {}}, "dpo and orpo exclude each other"),
        ({"dpo": {"loss_type": "aot"}}, "should be of sigmoid, hinge"),
        ({"dpo": {"loss_type": ["sigmoid"], "loss_weights": [1.0, 2.0]}}, "loss_weights: 2 of them for 1"),
        ({"dpo": {"label_smoothing": 0.1}}, "label_smoothing is for loss_type robust and exo_pair"),
        ({"dpo": {"loss_type": "exo_pair"}}, "needs a label_smoothing above 0"),
        ({"dpo": {}, "task": "text-classification"}, "dpo is for text-generation"),
        ({"dpo": {}, "data": {"train": "x", "packing": True}}, "data.packing is for supervised training"),
        ({"dpo": {}, "data": {"train": "x", "train_on": "all"}}, "data.train_on is for supervised training"),
        ({"dpo": {}, "data": {"train": "x", "overlong": "split"}}, "dpo has error, drop and truncate"),
        ({"dpo": {}, "data": {"train": {"path": "x", "format": "alpaca"}}}, "format is for supervised training"),
        ({"dpo": {}, "training": {"tokens_per_micro_batch": 4096}}, "dpo has auto and null"),
        ({"dpo": {}, "training": {"neftune_noise_alpha": 5.0}}, "neftune_noise_alpha is for supervised training"),
        ({"dpo": {}, "lora": {"lora_dropout": 0.1}}, "lora.lora_dropout: dpo compares the model with its reference"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(sections, message):
    with pytest.raises(InputError, match=message):
        recipe(**sections)


def test_orpo_has_no_reference_and_may_have_dropout():
    assert recipe(orpo={}, lora={"lora_dropout": 0.1}).objective.has_reference is False
