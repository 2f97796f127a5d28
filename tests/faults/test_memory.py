"""Memory that is refused for real: the system's limit on this process' memory, not an exception made up by a test."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests import forked
from tests.conftest import write_jsonl

# the limit is drawn when the libraries are there: {when} is what is about to run
SCRIPT = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qlora import base_model
from qlora.training.objectives import supervised
from qlora.cli import main

def limit(room):
    held = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")).split()[1])
    resource.setrlimit(resource.RLIMIT_AS, (held * 1024 + room,) * 2)

def before(owner, name, at, room):
    original, calls = getattr(owner, name), iter(range(10**6))
    def limited(*args, **kwargs):
        if next(calls) == at:
            limit(room)
        return original(*args, **kwargs)
    setattr(owner, name, limited)

{limits}
sys.argv = ["qlora", "train", {recipe!r}]
main()
"""


def run(recipe, limits):
    code = SCRIPT.format(limits=limits, recipe=str(recipe))
    return forked.run("-c", code)


@pytest.fixture
def recipe_file(make_recipe, tmp_path):
    """A recipe whose micro-batches take some 100 MiB: 64 rows of about 400 tokens."""
    text = "What is 1 plus 2? " * 40
    rows = [
        {"messages": [{"role": "user", "content": f"{n} {text}"}, {"role": "assistant", "content": text}]}
        for n in range(80)
    ]
    train = write_jsonl(tmp_path / "long.jsonl", rows)
    recipe = make_recipe(
        data={"train": str(train), "max_length": 512, "overlong": "truncate_prompt", "eval_fraction": 0.0},
        training={"per_device_train_batch_size": 64, "tokens_per_micro_batch": None, "max_steps": 3},
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    return file


MIB = 1 << 20


@pytest.mark.parametrize(
    ("limits", "where"),
    [
        pytest.param(
            f"before(supervised.Trainer, 'rehearse', 0, {32 * MIB})",
            r"in the rehearsal, before the first step: ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            f"before(supervised.Trainer, 'training_step', 1, {48 * MIB})",
            r"in step [23], micro-batch \d+: ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_the_system_refuses_memory_goes_on_with_less_or_says_what_to_change(
    recipe_file, tmp_path, limits, where
):
    done = run(recipe_file, limits)
    assert "Traceback" not in done.stderr
    if done.returncode == 0:  # what was freed is enough for less
        kept = json.loads((tmp_path / "run" / "memory.json").read_text())["less_memory"]
        assert kept
        assert done.stderr.count("run again, and so from here on: ") == len(kept)
        assert re.match(where, kept[0]["out_of_memory"])
        return
    assert done.returncode == 3, done.stderr
    found = re.search(
        rf"^qlora: out of memory ({where}(\d+ bytes requested|could not create a primitive|can't start new thread))$",
        done.stderr,
        re.M,
    )
    assert found, done.stderr
    assert "training row" in done.stderr
    assert "tried already: batches of this size run in two halves" in done.stderr
    assert "set data.max_length below 512" in done.stderr
    folder = tmp_path / "run"
    assert not (folder / "adapter").exists()
    assert json.loads((folder / "memory.json").read_text())["out_of_memory"] == found[1]


@pytest.mark.slow
def test_the_same_run_without_a_limit_ends_well(recipe_file, tmp_path):
    done = run(recipe_file, "")
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert "out_of_memory" not in kept
    assert kept["peak_bytes"] >= kept["rehearsed_bytes"] > 0


def test_a_model_that_cannot_be_loaded_for_want_of_memory_is_not_called_broken(recipe_file, tmp_path):
    done = run(recipe_file, "before(base_model, 'load', 0, 4096)")
    assert done.returncode == 3, done.stderr
    assert "was loaded: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "adapter").exists()


MANY_SIZES = """
import torch
from qlora.system import memory
W = torch.randn(576, 1536, dtype=torch.bfloat16)
def products(sizes):
    for size in sizes:
        (torch.ones(size, 1536, dtype=torch.bfloat16, requires_grad=True) @ W.T).sum().backward()
products(range(500, 520))
before = memory.anonymous_bytes()
products(range(520, 670))
print(memory.anonymous_bytes() - before)
"""


@pytest.mark.slow
def test_batches_of_many_sizes_do_not_fill_the_memory_with_code():
    """Two-sided: with what the libraries do by themselves it grows, where they have such caches at all."""
    capacity = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
    bare = {name: value for name, value in os.environ.items() if name not in capacity}
    grown = []
    for env in (bare, bare | capacity):
        done = subprocess.run([sys.executable, "-c", MANY_SIZES], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grown.append(int(done.stdout))
    if grown[1] < 100 * 2**20:
        pytest.skip(f"this CPU's products need no code of their own: {grown[1]:,} bytes more by default")
    assert grown[0] < grown[1] / 2
