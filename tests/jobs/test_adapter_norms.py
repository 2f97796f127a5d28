"""Norms of an adapter without torch, against the product itself and against what the merge reads."""

import json

import pytest
import torch
from safetensors.torch import save_file

from qlora import methods
from qlora.jobs.reporting.adapter_norms import norms, of_checkpoints
from qlora.recipe import Lora
from qlora.runs import record
from qlora.runs.checkpoints import TENSORS
from qlora.system.errors import InputError
from qlora.system.events import heard_by


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_lora_norm_is_that_of_the_product(tmp_path, dtype):
    torch.manual_seed(0)
    tensors, expected = {}, {}
    settings = {
        "model.layers.0.self_attn.q_proj": (4, 16),
        "model.layers.1.self_attn.q_proj": (4, 8),
        "model.layers.0.mlp.up_proj": (2, 16),
    }
    for module, (rank, alpha) in settings.items():
        A, B = torch.randn(rank, 24).to(dtype), torch.randn(12, rank).to(dtype)
        tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
        expected[module] = (alpha / rank**0.5 * B.double() @ A.double()).norm().item()
    folder = write(
        tmp_path, tensors, peft_type="LORA", r=4, lora_alpha=16, use_rslora=True,
        rank_pattern={"mlp.up_proj": 2}, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 8},
    )  # fmt: skip
    found = norms(folder)
    assert found["layers"] == [0, 1]
    assert found["modules"]["self_attn.q_proj"] == pytest.approx(
        [expected[f"model.layers.{n}.self_attn.q_proj"] for n in (0, 1)], rel=1e-5
    )
    assert found["modules"]["mlp.up_proj"] == [pytest.approx(expected["model.layers.0.mlp.up_proj"], rel=1e-5), None]


def test_they_agree_with_what_the_merge_adds(trained_once):
    folder = trained_once().adapter
    found = norms(folder)
    for name, update in methods.read(folder).updates.items():
        layer, module = int(name.split(".")[2]), name.split(".", 3)[3]
        expected = update.scaling * (update.B_OR.float() @ update.A_RI.float()).norm().item()
        assert found["modules"][module][layer] == pytest.approx(expected, rel=1e-4)
    assert "manifest.json" in {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_checkpoint_has_the_norms_of_its_adapter_by_layer(tmp_path, dtype):
    parts = {"A": torch.ones(2, 8), "B": torch.full((6, 2), 0.5)}
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
    save_file(
        {f"weights/base_model.model.layers.{n}.{module}.{names[part]}": ((n + 1) * tensor).to(dtype)
         for n in (0, 1) for module in ("q", "v") for part, tensor in parts.items()}
        | {"optimizer/masters": torch.ones(3)},
        tmp_path / TENSORS,
    )  # fmt: skip
    heard = []
    with heard_by(heard.append):
        of_checkpoints(Lora(r=2, lora_alpha=4))(record.CheckpointSaved(tmp_path, 5, 0, 0.0))
    (found,) = heard
    one = 2 * (parts["B"] @ parts["A"]).norm().item() * 2**0.5  # of two modules
    assert found.step == 5
    assert list(found.numbers.values()) == pytest.approx([one, 4 * one])


def test_other_methods_have_norms_of_what_is_saved(tmp_path):
    tensors = {
        "model.layers.0.mlp.down_proj.ia3_l": torch.full((1, 4), 1.5),
        "model.embed_tokens.weight": torch.ones(2, 2),
    }
    found = norms(write(tmp_path, tensors, peft_type="IA3"))
    assert found["modules"] == {"mlp.down_proj": [1.0]}
    tensors = {"prompt_embeddings": torch.full((2, 2), 2.0)}
    assert norms(write(tmp_path, tensors, peft_type="PROMPT_TUNING"))["others"] == {"prompt_embeddings": 4.0}


def test_a_damaged_or_missing_file_is_named(tmp_path):
    assert "no adapter" in norms(tmp_path)["missing"]  # a whole model
    folder = write(tmp_path, {"model.layers.0.q.lora_A.weight": torch.ones(1, 2)}, peft_type="LORA", r=1, lora_alpha=1)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: .*layers\.0\.q has no counterpart to lora_A"):
        norms(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: .*damaged"):
        norms(folder)
