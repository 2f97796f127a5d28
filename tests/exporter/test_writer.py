"""Files that safetensors itself opens, byte for byte what was given, whatever the shard size."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora.exporter.writer import Spec, shards, write
from qlora.system.events import heard_by

TENSORS = {
    "a": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "b.weight": torch.randn(7, 5).bfloat16(),
    "c": torch.tensor(3.5),
    "d": torch.arange(5),
    "e": torch.empty(0, 4),
    "f": torch.randn(4, 6).T,  # not contiguous
}


def in_pieces(name):
    """Yield a tensor in pieces of two rows."""
    tensor = TENSORS[name]
    yield from tensor.split(2) if tensor.dim() else [tensor]


SPECS = [Spec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize("max_bytes", [10**9, 64, 1])
def test_safetensors_reads_back_what_was_written(tmp_path, max_bytes):
    heard = []
    with heard_by(heard.append):
        total = write(tmp_path, SPECS, in_pieces, max_bytes)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= load_file(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in TENSORS)
    assert total == max(event.done for event in heard) == sum(t.numel() * t.element_size() for t in TENSORS.values())


def test_the_index_names_each_tensors_file_and_the_size_in_bytes(tmp_path):
    total = write(tmp_path, SPECS, in_pieces, 64)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == TENSORS.keys()
    for name, file_name in index["weight_map"].items():
        assert name in load_file(tmp_path / file_name)


def test_one_shard_has_the_plain_name_and_no_index(tmp_path):
    write(tmp_path, SPECS, in_pieces, 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_shards_keep_order_and_bound():
    parts = shards(SPECS, 64)
    assert [spec for part in parts for spec in part] == SPECS
    assert all(sum(spec.num_bytes for spec in part) <= 64 or len(part) == 1 for part in parts)
