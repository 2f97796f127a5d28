"""A model folder is found where it is, and refused by name where something is wrong with it."""

import json
import shutil

import pytest

from qlora import base_model
from qlora.recipe import Model
from qlora.system.errors import InputError
from tests.base_model.conftest import edit_config, load


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "not a complete"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is empty"),
        (lambda f: (f / "model.safetensors").write_text("<html>login</html>" * 9), "is a web page"),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "not a complete safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: edit_config(f, model_type="llamoid"), "llamoid"),
        (lambda f: edit_config(f, model_type="vit"), "'vit' is not a causal language model"),
        (lambda f: edit_config(f, model_type="bert"), "the model has"),
        (lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}), "quantized already"),
        (lambda f: edit_config(f, hidden_size=128), "the model has"),
    ],
    ids=["cut off", "empty", "html", "lfs pointer", "no weights", "no config", "broken config", "unknown architecture",
         "vision", "encoder", "quantized", "wrong size"],
)  # fmt: skip
def test_a_broken_model_folder_is_an_input_error(broken, break_it, expected):
    break_it(broken)
    with pytest.raises(InputError, match=expected):
        load(broken)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/x.safetensors", "a/b.safetensors", "weights.bin"])
def test_an_index_that_points_out_of_the_folder_is_refused(tiny_model, tmp_path, name):
    folder = shutil.copytree(tiny_model("llama", "100KB"), tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="not a plain safetensors file name"):
        load(folder)


def test_pickled_weights_are_never_read(broken):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights are not read"):
        load(broken)


def test_a_name_that_is_no_folder_and_not_on_the_hub_is_one_message():
    with pytest.raises(InputError, match="no such folder, and not a hub name"):
        base_model.find(Model(name_or_path="./none"))
    with pytest.raises(InputError, match="the hub says"):  # offline in the tests
        base_model.find(Model(name_or_path="nobody/nothing"))


def test_a_revision_of_a_local_folder_is_refused(tiny_model):
    with pytest.raises(InputError, match="has no revisions"):
        base_model.find(Model(name_or_path=str(tiny_model("llama")), revision="main"))


def test_a_hub_name_is_loaded_at_its_pinned_revision(tiny_model, tmp_path, monkeypatch):
    # The one thing the network would bring: a snapshot in the hub's cache layout.
    revision = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub"
    shutil.copytree(tiny_model("llama"), cache / "models--me--tiny" / "snapshots" / revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    checkpoint = base_model.find(Model(name_or_path="me/tiny", revision=revision))
    assert checkpoint.revision == revision
    assert checkpoint.name_or_path == "me/tiny"
    assert checkpoint.shapes()["model.norm.weight"] == (64,)


def test_a_repository_in_the_hubs_cache_means_its_snapshot(tiny_model, tmp_path):
    repository = tmp_path / "models--me--tiny"
    for revision in ("aaa", "bbb"):
        (repository / "snapshots").mkdir(parents=True, exist_ok=True)
        (repository / "snapshots" / revision).symlink_to(tiny_model("llama"))
    section = Model(name_or_path=str(repository))
    with pytest.raises(InputError, match=r"give one of its 2 snapshots:\n.*snapshots/aaa\n.*snapshots/bbb"):
        base_model.find(section)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb\n")
    assert base_model.find(section).folder == repository / "snapshots" / "bbb"
    (repository / "snapshots" / "bbb").unlink()
    assert base_model.find(section).folder == repository / "snapshots" / "aaa"
    (repository / "snapshots" / "aaa").unlink()
    with pytest.raises(InputError, match="it has no snapshot; download it again"):
        base_model.find(section)


def test_a_tokenizer_that_is_missing_is_an_input_error(broken):
    for path in broken.glob("token*"):
        path.unlink()
    with pytest.raises(InputError, match="no usable tokenizer"):
        base_model.load_tokenizer(broken, Model(name_or_path=str(broken)))
