"""model.attn_implementation: what is accepted, and what is refused where a package, a GPU or the network is missing."""

import pytest
import torch
import transformers
from transformers.integrations import hub_kernels

from qlora import base_model
from qlora.base_model import attention_choice
from qlora.recipe import Quantization
from qlora.recipe.sections import Model
from qlora.system.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PINNED = "kernels-community/flash-attn2@0123abc"


@pytest.mark.parametrize("name", ["auto", "sdpa", "eager"])
def test_attention_of_torch_needs_nothing(name):
    for device in (CPU, CUDA):
        attention_choice.refuse_missing(name, device)


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2", PINNED])
def test_attention_for_a_gpu_is_refused_on_a_cpu_before_a_weight_is_read(tiny_model, name):
    section = Model(name_or_path=str(tiny_model("llama")), attn_implementation=name)
    with pytest.raises(InputError, match=f"attn_implementation: {name} trains on an NVIDIA GPU only, and this is cpu"):
        base_model.load(base_model.find(section), section, Quantization(), CPU)


@pytest.mark.parametrize("version", ["2", "3", "4"])
def test_a_missing_flash_attn_is_refused_and_nothing_is_fetched_in_its_place(monkeypatch, version):
    monkeypatch.setattr(transformers.utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", lambda name: pytest.fail("fetched"))
    with pytest.raises(InputError, match="needs the package flash-attn"):
        attention_choice.refuse_missing(f"flash_attention_{version}", CUDA)


def test_a_kernel_of_the_hub_needs_its_package_and_the_network(monkeypatch):
    monkeypatch.setattr(transformers.utils, "is_kernels_available", lambda: False)
    with pytest.raises(InputError, match="pip install kernels"):
        attention_choice.refuse_missing(PINNED, CUDA)

    def offline(name):
        raise ValueError(f"An error occurred while trying to load from '{name}': offline mode is enabled.")

    monkeypatch.setattr(transformers.utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", offline)
    with pytest.raises(
        InputError, match=r"cannot be taken from the hub or its cache: .*offline mode.*\n.*set it to auto"
    ):
        attention_choice.refuse_missing(PINNED, CUDA)


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_3", PINNED])
def test_a_plan_asks_for_no_package_and_knows_that_rows_are_not_joined(monkeypatch, tiny_model, name):
    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", lambda name: pytest.fail("fetched"))
    config = transformers.AutoConfig.from_pretrained(tiny_model("llama"))
    model = base_model.load_on_meta(config, Model(name_or_path="m", attn_implementation=name), Quantization())
    assert model.config._attn_implementation == name


@pytest.mark.parametrize(
    "name",
    [
        "evil/kernel",
        "kernels-community/",
        "kernels-community/a/b",
        "kernels-community/../x",
        "flash_attention_5",
        "",
        "SDPA",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"should be one of|nobody has looked at"):
        Model(name_or_path="m", attn_implementation=name)
