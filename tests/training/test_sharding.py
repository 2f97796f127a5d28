"""Two processes that share the base train what one does, with half of the codes each."""

import json

import pytest
import torch

from qlora import train
from qlora.training import sharding
from tests.training.test_processes import FLOAT32, ROUNDING, STEPS, Started, losses, written

SHARED = {"sharding": "fsdp", "gradient_checkpointing": 1}


def test_two_processes_that_share_the_base_train_what_one_does(make_recipe, tmp_path):
    training = {**STEPS, "eval_steps": 3, "logging_steps": 1, "num_samples": 2}
    recipe = make_recipe(training=training, quantization=FLOAT32, memory={"gradient_checkpointing": 1})
    run = train(recipe.model_copy(update={"output_dir": str(tmp_path / "alone")}))
    shared = recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"sharding": "fsdp"})})
    two, both = written(shared, tmp_path, "two")
    (first, _, said), (second, _, err) = Started(two).finish()
    assert (first, second) == (0, 0), said + err
    for ours, theirs in zip(losses(both), losses(run), strict=True):
        assert ours == pytest.approx(theirs, abs=ROUNDING)
    assert len(losses(both)[0]) == 3
    ours, theirs = both.environment()["base_model"], run.environment()["base_model"]
    assert ours["quantized_sha256"] == theirs["quantized_sha256"]
