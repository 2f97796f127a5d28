"""Trajectories that are on record: no change of the code may change a number of them.

`QLORA_RECORD=1 pytest tests/test_golden.py` records them anew, for a change that is meant to change numbers.
On another processor or with other versions of the libraries last digits differ; then they are compared to 5 %. Another torch
may draw other random weights: it has no record.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora import Recipe, evaluate, export, train
from tests.conftest import some_slow
from tests.runs.test_checkpoints import stopped_and_resumed

RECORD = Path(__file__).parent / "golden" / "trajectories.json"
CASES = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "packing": ("llama", {"data": {"packing": True}, "training": {"per_device_train_batch_size": 1}}),
    "micro-batches": ("llama-tied", {"training": {"tokens_per_micro_batch": 160, "gradient_accumulation_steps": 2}}),
    "checkpointing": ("llama", {"memory": {"gradient_checkpointing": True}}),
    "dora": ("llama", {"lora": {"use_dora": True}}),
    "adalora": (
        "llama",
        {"adalora": {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1}},
    ),
    "16 bit": ("llama", {"quantization": None}),
}


def machine():
    """Return what the last digits depend on."""
    cpu = Path("/proc/cpuinfo")
    flags = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.is_file() else ""
    )
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")
    }
    return {**versions, "machine": platform.machine(), "cpu": hashlib.sha256(flags.encode()).hexdigest()[:12]}


def trajectory(run, folder):
    """Return what a training, its evaluation and its export into `folder` computed."""
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")
    export(run.path, folder)
    return {
        "steps": [{key: line[key] for key in kept if key in line} for line in lines],
        "adapter": _hash(load_file(run.adapter / "adapter_model.safetensors")),
        "tokens": json.loads(run.data_report_file.read_text())["tokens"],
        "held_out_loss": evaluate(run.path)["loss"],
        "export": _hash(
            {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
        ),
    }


def _hash(tensors):
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe_of(make_recipe):
    def make(name):
        family, sections = CASES[name]
        values = make_recipe(
            family, training={"max_steps": 4, "eval_steps": 2, "tokens_per_micro_batch": None}
        ).model_dump(exclude_unset=True)
        if name == "micro-batches":
            del values["training"]["per_device_train_batch_size"]
        if "adalora" in sections:
            del values["lora"]
        for section, fields in sections.items():
            values[section] = {**values.get(section, {}), **fields} if isinstance(fields, dict) else fields
        return Recipe.from_dict(values)

    return make


def _release(version):
    return version.partition("+")[0]  # without +cpu or +cu130


def check(name, found):
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"trajectories": {}}
    if os.environ.get("QLORA_RECORD"):
        record = {"machine": machine(), "trajectories": {**record["trajectories"], name: found}}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        return
    expected = record["trajectories"][name]
    if _release(record["machine"]["torch"]) != _release(torch.__version__):
        pytest.skip(f"recorded with torch {record['machine']['torch']}: others draw other random weights")
    if record["machine"] == machine():
        assert found == expected
        return
    for one, other in zip(found["steps"], expected["steps"], strict=True):
        assert one == pytest.approx(other, rel=0.05), name
    assert found["tokens"] == expected["tokens"]


@pytest.mark.parametrize("name", some_slow(CASES, but=["llama"]))
def test_a_recorded_trajectory_is_the_same_to_the_bit(name, recipe_of, tmp_path, one_thread):
    check(name, trajectory(train(recipe_of(name)), tmp_path / "out"))


@pytest.mark.parametrize("name", some_slow(["llama", "adalora"], ["llama"]))
def test_a_resumed_run_has_the_recorded_trajectory_too(name, recipe_of, tmp_path, one_thread, monkeypatch):
    check(name, trajectory(stopped_and_resumed(monkeypatch, recipe_of(name), 2), tmp_path / "out"))
