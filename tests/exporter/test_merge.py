"""The merge is dequantize(NF4(W)) + scaling * B A, exactly, and from the files alone equals what training held."""

import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file

from qlora import base_model, methods
from qlora.exporter import merge
from qlora.exporter.reader import Reader
from qlora.recipe import Lora, Model, Quantization
from qlora.system.errors import InputError
from tests.conftest import FAMILIES


def make(folder, model, tmp_path, dtype=torch.float32, original=False):
    """Return the Merge of `model` (a PeftModel) over the files in `folder`."""
    methods.save(model, tmp_path / "adapter", "x", None)
    section = Model(name_or_path=str(folder))
    checkpoint = base_model.find(section)
    read = methods.read(tmp_path / "adapter")
    plan = merge.plan(checkpoint, base_model.load_config(checkpoint, section), dtype, adapter=read)
    digests = base_model.digests(model.get_base_model())
    modules = {name.removesuffix(".base_layer"): digest for name, digest in digests.items()}
    base = merge.Base(modules, Quantization(), original)
    return merge.Merge(Reader(checkpoint), plan, read, base, torch.device("cpu"))


def tensor(merging, name):
    """Return the whole tensor that is written for parameter `name`."""
    return torch.cat([piece.reshape(-1) for piece in merging.pieces(name)]).view(merging.specs[name].shape)


@pytest.fixture
def peft_model(load_model):
    def build(family):
        model = methods.attach(load_model(family), Lora(r=4, lora_alpha=8))
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    return build


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_what_the_live_model_computes_with(peft_model, tiny_model, tmp_path, family):
    model = peft_model(family)
    merging = make(tiny_model(family), model, tmp_path)
    base = base_model.to_float32(model).get_base_model()
    parameters = {name.replace(".base_layer", ""): p for name, p in base.named_parameters() if ".lora_" not in name}
    assert [spec.name for spec in merging.plan.specs] == list(parameters)
    for name, parameter in parameters.items():
        found, module = tensor(merging, name), name.removesuffix(".weight")
        expected = parameter.detach()
        if getattr(parameter, "quant_state", None) is not None:
            layer = base.get_submodule(module)
            expected = dequantize_4bit(parameter.data, parameter.quant_state) + layer.get_delta_weight("default")
            if module in merging.plan.conv1d:
                expected = expected.T
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("cuda_code", [0, 9])
def test_blocks_of_zeros_are_merged_with_the_codes_that_training_held(tiny_model, tmp_path, cuda_code):
    """CUDA gives them another code than a CPU, and double quantization makes that another weight."""
    folder, name = shutil.copytree(tiny_model("llama"), tmp_path / "llama"), "model.layers.0.mlp.up_proj"
    weights = load_file(folder / "model.safetensors")
    weights[f"{name}.weight"][3:5] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    section = Model(name_or_path=str(folder))
    model = base_model.load(base_model.find(section), section, Quantization())
    here = base_model.digests(model)
    weight = model.get_submodule(name).weight
    blocks = weight.data.view(-1, 32)
    zeros = (blocks == 0x77).all(1)
    assert zeros.sum() == 2 * 64 // 64
    blocks[zeros] = 0x11 * cuda_code
    there = base_model.digests(model)
    assert {module for module in here if here[module] != there[module]} == {name}
    expected = dequantize_4bit(weight.data, weight.quant_state).float()
    model = methods.attach(model, Lora(r=4))
    merging = make(folder, model, tmp_path)
    merged = tensor(merging, f"{name}.weight")
    assert all(merging.digests.values())
    assert torch.equal(merged.bfloat16(), expected.bfloat16())
    assert merged[3:5].any()  # what training computed with, though the files have zeros
    # a run that goes on: the same weights again
    again = base_model.load(base_model.find(section), section, Quantization())
    base_model.restore_codes(again, there)
    assert base_model.digests(again) == there
    base_model.restore_codes(again, here)
    assert base_model.digests(again) == (here if cuda_code == 0 else there)


def test_other_codes_than_those_of_zeros_are_still_other_codes():
    codes = torch.randint(0, 256, (640, 1), dtype=torch.uint8)
    recorded = base_model.digest(codes)
    assert base_model.as_recorded(codes, recorded) is codes
    zeros, other = codes.clone(), codes.clone()
    zeros[32:64] = 0x77
    other[5] ^= 1
    assert base_model.as_recorded(other, recorded) is None
    assert base_model.as_recorded(zeros, recorded) is None
    assert base_model.as_recorded(codes[:33], recorded) is None


def test_gpt2_stores_its_matrices_transposed_and_biases_as_they_are(peft_model, tiny_model, tmp_path):
    merging = make(tiny_model("gpt2"), peft_model("gpt2"), tmp_path)
    assert tensor(merging, "transformer.h.0.attn.c_attn.weight").shape == (64, 192)
    assert merging.plan.shapes["transformer.h.0.attn.c_attn"] == (192, 64)
    original = merging.reader.rows(merging.plan.source["transformer.h.0.attn.c_attn.bias"])[:]
    assert torch.equal(tensor(merging, "transformer.h.0.attn.c_attn.bias"), original.float())
    assert original.abs().sum() > 0


def test_a_tied_head_is_written_once_and_an_untied_one_twice(peft_model, tiny_model, tmp_path):
    names = {}
    for family in ("llama", "llama-tied"):
        merging = make(tiny_model(family), peft_model(family), tmp_path / family)
        names[family] = {spec.name for spec in merging.plan.specs}
    assert names["llama"] - names["llama-tied"] == {"lm_head.weight"}


def test_the_embedding_and_the_head_are_not_rounded_to_nf4(peft_model, tiny_model, tmp_path):
    merging = make(tiny_model("llama"), peft_model("llama"), tmp_path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(tensor(merging, name), merging.reader.rows(name)[:].float())


def test_what_merging_and_casting_did_is_measured_per_module(peft_model, tiny_model, tmp_path):
    merging = make(tiny_model("llama"), peft_model("llama"), tmp_path, torch.bfloat16)
    name = "model.layers.0.mlp.up_proj"
    cast = tensor(merging, f"{name}.weight")
    (measured,) = merging.modules
    update = merging.adapter.updates[name]
    A, B = update.A_RI.float(), update.B_OR.float()
    W = merging.reader.rows(f"{name}.weight")[:]
    codes, state = quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
    state.dtype = torch.float32
    base = dequantize_4bit(codes, state)
    assert measured["name"] == name
    assert measured["delta_norm"] == pytest.approx((2 * B @ A).norm().item(), rel=1e-4)
    assert measured["quantization_error"] == pytest.approx((base - W.float()).norm().item(), rel=1e-4)
    assert measured["cast_error"] == pytest.approx((cast.float() - base - 2 * B @ A).norm().item(), rel=1e-3)


def test_a_number_too_large_for_float16_is_an_error_that_names_the_tensor(peft_model, tiny_model, tmp_path):
    model = peft_model("llama")
    next(iter(methods.trainable(model).first_to_move.values())).data.fill_(1e6)
    merging = make(tiny_model("llama"), model, tmp_path, torch.float16)
    with pytest.raises(InputError, match=r"model.layers.0.self_attn.q_proj.weight: largest number .* --dtype bfloat16"):
        tensor(merging, "model.layers.0.self_attn.q_proj.weight")


def test_a_tensor_that_the_files_lack_is_an_error(tiny_model):
    section = Model(name_or_path=str(tiny_model("llama")))
    checkpoint = base_model.find(section)
    del checkpoint.files["model.norm.weight"]
    with pytest.raises(InputError, match=r"model.norm.weight"):
        merge.plan(checkpoint, base_model.load_config(checkpoint, section), torch.float16)


def test_files_without_the_models_prefix_are_found(tiny_model, tmp_path):
    # as openai-community/gpt2 has them
    folder = shutil.copytree(tiny_model("gpt2"), tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    section = Model(name_or_path=str(folder))
    checkpoint = base_model.find(section)
    plan = merge.plan(checkpoint, base_model.load_config(checkpoint, section), torch.float16)
    assert plan.source["transformer.wte.weight"] == "wte.weight"
