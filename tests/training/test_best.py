"""What is looked at while a model trains: samples, the best evaluation, when to stop. None of it changes a number."""

import json
import signal

import pytest
import torch

from qlora.commands.adapters import adapters
from qlora.commands.train import train
from qlora.runs import record
from qlora.runs.checkpoints import Checkpoints, read_tensors
from qlora.training.best import Best
from qlora.training.objectives.supervised import Trainer
from tests.runs.test_checkpoints import assert_same_run, computed, recipe_of, rows, stopped_and_resumed, weights  # noqa: F401

pytestmark = pytest.mark.usefixtures("unplanned")
SMALL = {"gradient_accumulation_steps": 1, "per_device_eval_batch_size": 4, "lr_scheduler_type": "constant"}
# held-out loss falls and rises again within a few steps
WORSE = {**SMALL, "learning_rate": 0.1, "max_steps": 12, "eval_steps": 1, "watchdog_steps": None}


def test_try(recipe_of, capsys):
    run = train(recipe_of("run", num_samples=2, load_best_model_at_end=True, early_stopping_patience=3, **WORSE))
    print(run.metrics_file.read_text())
    for p in sorted(run.checkpoints.iterdir()): print(p)
    assert 0
