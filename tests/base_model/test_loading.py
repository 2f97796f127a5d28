"""The base is exactly what the files hold, in NF4 and bfloat16."""

import json

import pytest
import torch

from qlora import base_model, methods
from qlora.recipe import Lora, Model
from tests.base_model.conftest import load
from tests.conftest import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_names_by_dtype_are_exactly_these(load_model, family):
    model = methods.attach(load_model(family), Lora(r=4))
    by_dtype = {}
    for name, parameter in model.named_parameters():
        by_dtype.setdefault(parameter.dtype, set()).add(name)
    linear = {f"base_model.model.{name}" for name in base_model.linear_names(model.get_base_model())}
    linear = {name.removesuffix(".base_layer") for name in linear if ".lora_" not in name}
    assert by_dtype.pop(torch.uint8) == {f"{name}.base_layer.weight" for name in linear}
    assert set(by_dtype) == {torch.bfloat16}  # nothing in float32
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lora_{factor}.default.weight" for name in linear for factor in "AB"}


def test_the_head_and_the_embedding_are_not_quantized(load_model):
    for family in ("llama", "llama-tied", "gpt2", "phi"):
        model = load_model(family)
        assert model.get_output_embeddings().weight.dtype == torch.bfloat16
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_without_quantization_every_parameter_is_bfloat16(load_model):
    model = load_model("gpt2", None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert base_model.quantized_modules(model) == {}


def test_sharded_and_single_files_give_the_same_model(tiny_model):
    single, sharded = tiny_model("llama"), tiny_model("llama", "100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, other = load(single).state_dict(), load(sharded).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("rows", "pad"), [(512, "<pad>"), (279, "<pad>"), (278, "<|im_end|>")])
def test_a_pad_token_for_which_the_embedding_has_no_row_is_not_used(tokenizer, tmp_path, rows, pad):
    assert len(tokenizer) == 278
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    for config in ({"vocab_size": rows}, {"text_config": {"vocab_size": rows}}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
        assert base_model.load_tokenizer(tmp_path, Model(name_or_path=str(tmp_path))).pad_token == pad
