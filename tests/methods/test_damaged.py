"""A folder of any method that is damaged, or made for another base, ends in one message, and the base stays as it is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import methods
from qlora.recipe import Bottleneck, Full, Hira, Ia3, Oft, PrefixTuning, PromptTuning
from qlora.system.errors import InputError

SECTIONS = [Ia3(), Oft(), Hira(r=4), Bottleneck(size=8), PrefixTuning(), PromptTuning(num_virtual_tokens=4)]
each = pytest.mark.parametrize("section", [*SECTIONS, Full()], ids=lambda section: section.key)


@pytest.fixture
def folder(load_model, tmp_path):
    def make(section, family="llama"):
        model = methods.attach(load_model(family, None), section)
        methods.save(model, tmp_path / "saved", "base", None)
        return tmp_path / "saved"

    return make


def change(folder, edit):
    """Edit {name: tensor} of a saved folder in place."""
    path = next(folder.glob("*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(load_model, folder, family="llama"):
    model = load_model(family, None)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError) as error:
        methods.load(model, folder)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before.keys() & after.keys())
    return str(error.value)


def last(tensors):
    return max(tensors)


@each
def test_a_number_that_is_not_finite(folder, load_model, section):
    saved = folder(section)
    change(saved, lambda tensors: tensors[last(tensors)].view(-1)[0].fill_(float("nan")))
    assert "non-finite" in refused(load_model, saved)


@each
def test_a_tensor_of_another_shape(folder, load_model, section):
    saved = folder(section)
    change(saved, lambda tensors: tensors.update({last(tensors): torch.zeros(3, 5)}))
    assert str(saved) in refused(load_model, saved)


@each
def test_a_tensor_too_many(folder, load_model, section):
    saved = folder(section)
    change(saved, lambda tensors: tensors.update({"base_model.model.model.layers.9.nothing": torch.zeros(3)}))
    assert str(saved) in refused(load_model, saved)


@pytest.mark.parametrize(
    "section", [Bottleneck(size=8), Hira(r=4), PrefixTuning(), PromptTuning(), Oft(), Ia3()], ids=lambda one: one.key
)
def test_a_tensor_too_few(folder, load_model, section):
    saved = folder(section)
    change(saved, lambda tensors: tensors.pop(last(tensors)))
    assert str(saved) in refused(load_model, saved)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.key)
@pytest.mark.parametrize("edit", [{"peft_type": "NOTHING"}, {"peft_type": None}, {"use_magic": True}])
def test_a_config_that_is_not_followed(folder, load_model, section, edit):
    saved = folder(section)
    config = json.loads((saved / methods.CONFIG).read_text())
    (saved / methods.CONFIG).write_text(json.dumps(config | edit))
    assert str(saved) in refused(load_model, saved)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.key)
def test_a_config_without_its_size(folder, load_model, section):
    saved = folder(section)
    config = json.loads((saved / methods.CONFIG).read_text())
    sizes = {"size", "r", "oft_block_size", "num_virtual_tokens", "target_modules"} & config.keys()
    (saved / methods.CONFIG).write_text(json.dumps({key: value for key, value in config.items() if key not in sizes}))
    if section.key != "ia3":  # whose target_modules only say again where its tensors are
        assert str(saved) in refused(load_model, saved)


@pytest.mark.parametrize("section", [*SECTIONS[:-1], Full()], ids=lambda section: section.key)
def test_another_base(folder, load_model, section):
    saved = folder(section)
    assert str(saved) in refused(
        load_model, saved, "gpt2" if section.key in ("bottleneck", "prefix_tuning") else "wide"
    )


def test_prompts_of_another_width(folder, load_model):
    saved = folder(PromptTuning(num_virtual_tokens=4))
    config = json.loads((saved / methods.CONFIG).read_text())
    (saved / methods.CONFIG).write_text(json.dumps(config | {"token_dim": 32}))
    change(saved, lambda tensors: tensors.update({last(tensors): torch.zeros(4, 32)}))
    assert "made for another base; its embeddings have 32 numbers, the base's 64" in refused(load_model, saved)
