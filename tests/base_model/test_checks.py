"""Anything less than what the config says is an error."""

import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora import base_model
from qlora.recipe import Model
from qlora.system.errors import InputError
from tests.base_model.conftest import load, rewrite
from tests.conftest import FAMILIES


def test_a_missing_weight_is_an_error_never_a_random_tensor(broken):
    rewrite(broken, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"missing: model.layers.1.mlp.up_proj.weight"):
        load(broken)


def test_a_weight_that_the_config_does_not_know_is_an_error(broken):
    rewrite(
        broken, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(128, 64, dtype=torch.bfloat16)})
    )
    with pytest.raises(InputError, match=r"not used by this architecture: model.layers.2.mlp.up_proj.weight"):
        load(broken)


def test_a_weight_of_another_shape_is_an_error(broken):
    rewrite(broken, lambda t: t.update({"model.norm.weight": torch.ones(65, dtype=torch.bfloat16)}))
    with pytest.raises(InputError, match=r"model.norm.weight"):
        load(broken)


def test_a_buffer_that_the_architecture_leaves_in_the_files_may_be_infinite(tmp_path, tokenizer):
    # files of GPT-NeoX in float16 hold a masked_bias of -1e9, which is -inf there, and no code reads it any more
    config = transformers.GPTNeoXConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9).half()
    assert tensors["gpt_neox.layers.0.attention.masked_bias"].isinf()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = load(tmp_path)
    assert len(base_model.quantized_modules(model)) == 4
    tensors["gpt_neox.layers.0.attention.query_key_value.bias"][0] = math.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"1 problem\n  gpt_neox.layers.0.attention.query_key_value.bias: contains non-finite"
    ):
        load(tmp_path)


def test_a_model_of_such_a_width_is_refused_on_a_cpu_and_trained_without_quantization(tmp_path):
    config = FAMILIES["llama"]()
    config.intermediate_size = 96
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert "model.layers.1.mlp.down_proj: 96 inputs" in str(caught.value)
    assert "up_proj" not in str(caught.value)
    section = Model(name_or_path=str(tmp_path))
    model = base_model.load(base_model.find(section), section, None)
    assert model.model.layers[1].mlp.down_proj.weight.shape == (64, 96)
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()
