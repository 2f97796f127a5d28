"""A folder in dynamic int8 opens by itself, is the model that was trained, and is refused where it is not; see docs/serving.md."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora.commands.export import export
from qlora.exporter import int8
from qlora.system.errors import InputError, ProofFailed

pytestmark = pytest.mark.usefixtures("unplanned")
needs_torchao = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("torchao") is None, reason="no torchao; pip install '.[int8]'"
)


@pytest.fixture(scope="module")
def exported(trained_once, tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / "out"
    return out, export(trained_once("llama").path, out, overrides=["export.int8=true", "export.max_shard_size=100KB"])


@needs_torchao
def test_it_opens(exported):
    out, report = exported
    print(json.dumps({k: v for k, v in report.items() if k != "modules"}, indent=1))
    print(sorted(p.name for p in out.iterdir()))
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    print(model.dtype, type(model.model.layers[0].mlp.up_proj.weight))
