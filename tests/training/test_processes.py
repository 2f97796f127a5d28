"""Two processes train what one does: the same steps to rounding, one run folder, one message."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from qlora import train
from qlora.runs.folder import RunDir
from qlora.system.errors import InputError
from qlora.training import processes
from tests import forked

# Sums of float32 gradients in another order: about 1e-7 of each, through two or four steps at a high learning rate, in bf16.
ROUNDING = 2e-3
STEPS = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_samples": 0}


def surroundings(count, rank, port):
    names = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}


def free_port():
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def start(recipe_file, *arguments, count=2):
    """Return the processes of a training, as torchrun would start them."""
    port = free_port()
    return [
        forked.Process("train", recipe_file, *arguments, environ=surroundings(count, rank, port)) for rank in range(count)
    ]


def finish(started, timeout=120):
    """Return [(exit code, stdout, stderr)]."""
    found = []
    for process in started:
        out, err = process.communicate(timeout)
        found.append((process.returncode, out, err))
    return found


def written(recipe, folder, name):
    file = folder / f"{name}.yaml"
    file.write_text(recipe.model_copy(update={"output_dir": str(folder / name)}).to_yaml())
    return file, RunDir(folder / name)


def losses(run):
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_two_processes_train_what_one_does(make_recipe, tmp_path):
    recipe = make_recipe(training={**STEPS, "eval_steps": 3, "logging_steps": 1})
    alone, run = written(recipe, tmp_path, "alone")
    assert forked.run("train", alone).returncode == 0
    two, both = written(recipe, tmp_path, "two")
    (first, _, said), (second, out, err) = finish(start(two))
    assert (first, second) == (0, 0), said + err
    assert (out, err) == ("", "")
    assert "processes 2" in said
    for ours, theirs in zip(losses(both), losses(run), strict=True):
        assert ours == pytest.approx(theirs, abs=ROUNDING)
    assert len(losses(both)[0]) == 3
    assert both.adapter.is_dir()
