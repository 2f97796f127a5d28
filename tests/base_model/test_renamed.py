"""Tensors that transformers renames when it reads a folder are found in the files, and written as it would write them."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora import base_model
from qlora.recipe import Model
from tests.commands.images import CONFIGS, model_folder


def opened(folder, task):
    return base_model.find(Model(name_or_path=str(folder)), task=base_model.Task(task, ("a", "b")))


@pytest.mark.parametrize("kind", ["Model", "ForImageClassification"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_the_body_is_found_in_the_files(tmp_path, name, kind):
    checkpoint = opened(model_folder(tmp_path, name, kind), "image-classification")
    model = base_model.on_meta(base_model.load_config(checkpoint, Model(name_or_path="x")))
    found = {key: checkpoint.in_files(key, model.base_model_prefix) for key in model.state_dict()}
    missing = {key for key, stored in found.items() if stored is None}
    assert missing == (set() if kind != "Model" else {"classifier.weight", "classifier.bias"})
    assert {stored for stored in found.values() if stored} <= checkpoint.files.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_written_names_are_those_that_transformers_saves(tmp_path, name):
    folder = model_folder(tmp_path, name, "ForImageClassification")
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    written = base_model.written_names(model)
    names = {written.get(key, key) for key in model.state_dict()}
    assert names == load_file(folder / "model.safetensors").keys()


def test_names_of_before_transformers_are_found_and_not_written(tmp_path):
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})  # as the files of bert-base-uncased are
    checkpoint = opened(tmp_path, "text-classification")
    assert checkpoint.in_files("bert.embeddings.LayerNorm.weight", "bert") == "bert.embeddings.LayerNorm.gamma"
    model = transformers.BertForSequenceClassification(config)
    assert base_model.written_names(model) == {}
