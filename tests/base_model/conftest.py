"""What several tests of the base have in common."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qlora import base_model
from qlora.recipe import Model, Quantization


def load(folder, **settings):
    section = Model(name_or_path=str(folder))
    return base_model.load(base_model.find(section), section, Quantization(**settings))


def stored_bits_per_parameter(state, codes):
    """Return the bits that a number of a 4-bit weight costs: its code, the absmax of its block, and the constants of those."""
    stored = [codes, state.absmax, *([state.state2.absmax] if state.nested else [])]
    return 8 * sum(tensor.nbytes for tensor in stored) / state.shape.numel()


@pytest.fixture
def broken(tiny_model, tmp_path):
    """A copy of a tiny model to break."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
