"""What the recipe's task decides of its other fields: defaults, and what is refused by name."""

import pytest

from qlora.recipe import Recipe
from qlora.system.errors import InputError

MINIMAL = {"model": {"name_or_path": "m"}, "data": {"train": "d.csv"}, "output_dir": "o"}


def recipe(*overrides, **sections):
    return Recipe.from_dict({"task": "text-classification", **MINIMAL, **sections}, overrides)


def test_a_task_with_classes_has_defaults_that_suit_it():
    training = recipe().training
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (16, 1)
    assert training.group_by_length
    assert training.tokens_per_micro_batch is None
    assert recipe("training.per_device_train_batch_size=4").training.per_device_train_batch_size == 4
    words = Recipe.from_dict(MINIMAL)
    assert words.task == "text-generation"
    assert (words.training.per_device_train_batch_size, words.training.tokens_per_micro_batch) == (1, "auto")
    again = Recipe.from_dict(recipe("training.group_by_length=false").model_dump())
    assert not again.training.group_by_length  # a resolved recipe stays as it is


def test_classes_that_are_called_like_numbers_may_be_written_as_numbers(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("task: text-classification\nmodel: {name_or_path: m}\ndata: {train: d.csv, labels: [0, 1], "
                    "class_weights: {1: 5.0}}\noutput_dir: o\n")  # fmt: skip
    data = Recipe.load(file).data
    assert (data.labels, data.class_weights) == (["0", "1"], {"1": 5.0})


@pytest.mark.parametrize(
    ("override", "wrong"),
    [("data.packing=true", "data.packing is for text-generation"),
     ("data.train_on=all", "data.train_on is for text-generation"),
     ("data.thoughts=drop", "data.thoughts is for text-generation"),
     ("data.chat_template=chatml", "data.chat_template is for text-generation"),
     ("data.overlong=split", "data.overlong split is for conversations"),
     ("training.tokens_per_micro_batch=auto", "training.tokens_per_micro_batch is for text-generation"),
     ("training.tokens_per_micro_batch=4096", "training.tokens_per_micro_batch is for text-generation"),
     ("model.new_tokens=[<a>]", "model.new_tokens is for text-generation"),
     ("export.verify=layers", "export.verify layers is for text-generation"),
     ("prompt_tuning={}", "prompt_tuning is for text-generation: it does not train a head"),
     ("prefix_tuning={}", "prefix_tuning is for text-generation: it does not train a head"),
     ("data.labels=[a, a]", "a is listed more than once"),
     ("data.class_weights={c: 2}", "c is not in data.labels"),
     ("data.class_weights={a: 0}", "the weight of a should be a number above 0"),
     ("data.class_weights=none", r"should be balanced, null or \{class: weight, \.\.\.\}"),
     ("task=text_classification", "is not one of 'text-generation', 'text-classification'")],
)  # fmt: skip
def test_what_a_task_with_classes_does_not_have_is_refused_by_name(override, wrong):
    labels = [] if override.startswith("data.labels") else ["data.labels=[a, b]"]
    with pytest.raises(InputError, match=wrong):
        recipe(*labels, override)


@pytest.mark.parametrize("override", ["data.labels=[a, b]", "data.class_weights=balanced"])
def test_classes_are_refused_where_the_answer_is_words(override):
    with pytest.raises(InputError, match="is for a task with classes, such as text-classification"):
        Recipe.from_dict(MINIMAL, [override])
