"""The recipes for instruction tuning, each planned for the published shape of its model: the header says what the plan says."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from qlora import planner
from qlora.jobs.planning.plan_job import Budget, computer_of, without_data
from qlora.recipe import Recipe
from qlora.system.cards import CARDS
from tests.conftest import some_slow
from tests.recipe.shapes import SHAPES

ROOT = Path(__file__).parents[2]
RECIPES = {path.parent.name: path for path in sorted((ROOT / "recipes").glob("*/instruct.yaml"))}
SLOW = set(RECIPES) - {"gemma-3-4b"}  # a plan takes a second
SIZES = (8, 12, 16, 24)  # GB of the cards that people have
MARGIN = 0.9  # of what a process sees of the card
GIB = 2**30


def folder_of(name, tmp_path):
    """Return a folder with the published config.json of the model that recipe `name` is for."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[Recipe.load(RECIPES[name]).model.name_or_path][0]))
    return tmp_path


def plan_of(name, folder):
    """Return (bytes that training takes at least, the smallest card size in GB that has them with a margin)."""
    least = ["memory.gradient_checkpointing=true", "memory.offload=false", "training.tokens_per_micro_batch=2048"]
    recipe = Recipe.load(RECIPES[name], [f"model.name_or_path='{folder}'", *least])
    assert recipe.data.max_length == 2048
    peak = planner.plan(without_data(recipe, "cuda", Budget(0), computer_of("3090"))).peak_bytes
    fits = [size for size in SIZES if peak <= MARGIN * min(card.memory for card in CARDS if card.size == size)]
    return peak, min(fits)


def with_plan(text, peak, size):
    """Return the text of a recipe with what was planned in its header."""
    text = re.sub(r"(?<= on one )\d+(?= GB card\.)", str(size), text, count=1)
    return re.sub(r"(?<=# Memory, planned: )\S+(?= GiB )", f"{peak / GIB:.1f}", text, count=1)


@pytest.mark.parametrize("name", some_slow(list(RECIPES), SLOW))
def test_the_header_says_the_memory_that_is_planned_and_the_smallest_card(name, tmp_path):
    text = RECIPES[name].read_text(encoding="utf-8")
    assert text == with_plan(text, *plan_of(name, folder_of(name, tmp_path))), (
        "python -m tests.recipe.test_planned_recipes"
    )
    assert re.search(r"on one \d+ GB card\.\n(.|\n)*# Memory, planned: \d+\.\d GiB ", text)


@pytest.mark.parametrize("name", some_slow(list(RECIPES), SLOW))
def test_the_shape_has_as_many_parameters_as_the_model_is_said_to_have(name, tmp_path):
    config = transformers.AutoConfig.from_pretrained(folder_of(name, tmp_path))
    kind = transformers.AutoModelForImageTextToText if "vision_config" in config else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        counted = kind.from_config(config).num_parameters()
    billions = SHAPES[Recipe.load(RECIPES[name]).model.name_or_path][1]
    digits = len(str(billions).partition(".")[2])
    assert round(counted / 1e9, digits) == billions


def test_every_recipe_says_what_to_type_and_that_nothing_was_measured():
    for name, path in RECIPES.items():
        text = path.read_text(encoding="utf-8")
        assert f"qlora train recipes/{name}/instruct.yaml data.train=mine.jsonl" in text
        assert f"output_dir: runs/{name}-instruct" in text
        assert "# Measured: not measured yet" in text


def rewrite(folder):
    """Write what is planned into the headers: python -m tests.recipe.test_planned_recipes."""
    for name, path in RECIPES.items():
        path.write_text(
            with_plan(path.read_text(encoding="utf-8"), *plan_of(name, folder_of(name, folder))), encoding="utf-8"
        )


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        rewrite(Path(scratch))
