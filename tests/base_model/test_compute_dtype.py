"""What a model computes in: by the card, the recipe and the family; and what a float16 model is."""

import platform
import re
from pathlib import Path

import pytest
import torch

from qlora import base_model
from qlora.base_model.compute_dtype import Computer, choose
from qlora.jobs.planning import plan_job
from qlora.recipe import Model, Quantization, Recipe
from qlora.system.errors import InputError

OLD, NEW = Computer("Tesla T4", False), Computer("RTX 4090", True)
LAPTOP, SERVER = (Computer("processor", has, is_gpu=False) for has in (False, True))


@pytest.mark.parametrize(
    ("wanted", "family", "on", "dtype", "why"),
    [
        ("auto", "llama", NEW, "bfloat16", ""),
        ("auto", "llama", OLD, "float16", "the Tesla T4 has no bfloat16"),
        ("auto", "gemma3_text", NEW, "bfloat16", ""),
        (
            "auto",
            "gemma3_text",
            OLD,
            "float32",
            "the Tesla T4 has no bfloat16, and activations of Gemma 3 overflow float16",
        ),
        ("float16", "gemma2", NEW, "float16", "activations of Gemma 2 overflow"),
        ("float16", "llama", NEW, "float16", ""),
        ("bfloat16", "llama", OLD, "bfloat16", "emulates bfloat16"),
        ("float32", "gemma2", OLD, "float32", ""),
        ("auto", "llama", LAPTOP, "float32", "the processor has no instructions for bfloat16"),
        ("auto", "llama", SERVER, "bfloat16", ""),
        ("bfloat16", "llama", LAPTOP, "bfloat16", "emulates bfloat16: slow; auto is faster"),
    ],
)
def test_the_choice_and_its_reason(wanted, family, on, dtype, why):
    found, said = choose(wanted, family, on)
    assert found == dtype
    assert said.startswith(why) if why.startswith(("the", "act")) else why in said
    assert bool(said) == bool(why)


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((7, 0), False), ((8, 0), True), ((12, 0), True)])
def test_a_card_has_bfloat16_by_its_capability_whatever_torch_says_of_emulation(monkeypatch, capability, has):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert base_model.computer(torch.device("cuda", 0)) == Computer("a card", has)


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="reads x86's flags")
def test_a_processor_has_bfloat16_by_its_instructions():
    flags = re.search("^flags.*", Path("/proc/cpuinfo").read_text(), re.M)[0].split()
    assert base_model.computer(torch.device("cpu")) == Computer("processor", "avx512_bf16" in flags, is_gpu=False)


@pytest.mark.parametrize(
    ("name", "has"), [("T4", False), ("RTX 2080 Ti", False), ("V100 16GB", False), ("RTX 3090", True), ("4090", True)]
)
def test_a_plan_for_a_card_computes_in_what_the_card_has(name, has):
    assert plan_job.computer_of(name).has_bfloat16 == has


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_float16_model_has_the_codes_of_a_bfloat16_one_and_nearly_its_numbers(load_model, family):
    half = load_model(family, Quantization(compute_dtype="float16"))
    brain = load_model(family)
    assert base_model.digests(half) == base_model.digests(brain)
    assert all(p.dtype == torch.float16 for p in half.parameters() if p.is_floating_point())
    for name, parameter in brain.named_parameters():
        if parameter.is_floating_point():
            assert torch.allclose(half.get_parameter(name).float(), parameter.float(), rtol=0, atol=2.0**-25)
    module = next(iter(base_model.quantized_modules(half).values()))
    assert module(torch.ones(1, 1, module.in_features, dtype=torch.float16)).dtype == torch.float16
    logits = [model(input_ids=torch.arange(1, 9)[None]).logits.float() for model in (half, brain)]
    assert (logits[0] - logits[1]).norm() < 0.03 * logits[1].norm()


@pytest.mark.parametrize(
    ("dtype", "found"), [("float16", torch.float16), ("float32", torch.float32), ("auto", torch.bfloat16)]
)
def test_a_base_that_is_not_quantized_computes_in_model_dtype(tiny_model, dtype, found):
    section = Model(name_or_path=str(tiny_model()), dtype=dtype)
    model = base_model.load(base_model.find(section), section, None)
    assert {p.dtype for p in model.parameters()} == {found}
    config = base_model.load_config(base_model.find(section), section)
    assert {p.dtype for p in base_model.load_on_meta(config, section, None).parameters()} == {found}


def test_the_model_without_numbers_is_in_float16_too(tiny_model, load_model):
    section, quantization = Model(name_or_path=str(tiny_model())), Quantization(compute_dtype="float16")
    empty = base_model.load_on_meta(base_model.load_config(base_model.find(section), section), section, quantization)
    real = load_model("llama", quantization)
    assert {n: p.dtype for n, p in empty.named_parameters()} == {n: p.dtype for n, p in real.named_parameters()}


def test_a_weight_beyond_float16_is_named(load_model):
    model = load_model("llama", None)
    model.model.norm.weight.data[3] = 1e5
    with pytest.raises(InputError, match=r"model\.norm\.weight has weights above 65,504"):
        base_model.quantized.to_float16(model)


def test_what_is_kept_in_float32_beside_float16_is(load_model):
    model = load_model("llama", None)
    model._keep_in_fp32_modules = ["norm"]
    base_model.quantized.to_float16(model)
    found = {name: p.dtype for name, p in model.named_parameters()}
    assert all(dtype == (torch.float32 if "norm" in name else torch.float16) for name, dtype in found.items())


def test_one_field_says_the_dtype(make_recipe):
    with pytest.raises(InputError, match=r"set quantization.compute_dtype: float16 instead"):
        make_recipe(model={"dtype": "float16"})
    assert make_recipe(model={"dtype": "float16"}, quantization=None).model.dtype == "float16"
    with pytest.raises(InputError, match=r"'half' is not one of 'auto', 'bfloat16', 'float16'"):
        Recipe.from_dict(make_recipe().model_dump(), ["quantization.compute_dtype=half"])
