"""NF4 costs what it should, computes what it should, and stays as it is."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Params4bit
from torch.nn import functional as F

from qlora import base_model, methods
from qlora.recipe import Lora
from tests.base_model.conftest import load, stored_bits_per_parameter

NF4_ERROR_MEAN, NF4_ERROR_STD = 0.07281, 1.5e-4


def test_nf4_round_trip_error_is_that_of_the_data_type():
    # Mean absolute error on N(0, 1) in blocks of 64, over 20 other seeds of 2^18 numbers: 0.07281, standard deviation
    # 1.5e-4 (without double quantization). Five deviations either side; 8-bit absmax adds 7.4e-5.
    errors = {False: [], True: []}
    for seed in range(5):
        W = torch.randn(512, 512, generator=torch.Generator().manual_seed(seed))
        for double in errors:
            codes, state = quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=double)
            errors[double].append((dequantize_4bit(codes, state) - W).abs().mean().item())
    plain, double = (sum(found) / len(found) for found in errors.values())
    assert abs(plain - NF4_ERROR_MEAN) < 5 * NF4_ERROR_STD
    assert 0 < double - plain < 2e-4


def test_a_number_costs_4_127_bits():
    weight = Params4bit(torch.randn(1024, 1024), compress_statistics=True, quant_type="nf4").to("cpu")
    expected = 4 + 8 / 64 + 32 / (64 * 256)
    assert stored_bits_per_parameter(weight.quant_state, weight.data) == expected
    plain = Params4bit(torch.randn(1024, 1024), compress_statistics=False, quant_type="nf4").to("cpu")
    assert stored_bits_per_parameter(plain.quant_state, plain.data) == 4 + 32 / 64


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_a_quantized_layer_is_a_plain_layer_on_the_dequantized_weight(load_model, family):
    model = load_model(family)
    for name, module in base_model.quantized_modules(model).items():
        x = torch.randn(3, 5, module.in_features, dtype=torch.bfloat16)
        W = dequantize_4bit(module.weight.data, module.weight.quant_state)
        expected = F.linear(x, W, module.bias)
        torch.testing.assert_close(module(x), expected, msg=name)


def test_float32_compute_is_explicit_and_exact(tiny_model):
    model = load(tiny_model("llama"), compute_dtype="float32")
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}
    module = model.model.layers[0].mlp.up_proj
    bf16 = load(tiny_model("llama")).model.layers[0].mlp.up_proj
    assert torch.equal(module.weight.data, bf16.weight.data)  # the same codes: W is bf16 when it is quantized
    exact = dequantize_4bit(module.weight.data, module.weight.quant_state)
    rounded = dequantize_4bit(bf16.weight.data, bf16.weight.quant_state)
    assert exact.dtype == torch.float32
    assert torch.equal(exact.bfloat16(), rounded)
    assert not torch.equal(exact, rounded.float())


def gradients(model, evaluate_first):
    model = methods.attach(model, Lora(r=4))
    ids = torch.arange(1, 33)[None]
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    if evaluate_first:
        with torch.no_grad():
            model.eval()(input_ids=ids)
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_evaluating_leaves_weights_and_gradients_as_they_were(load_model, family):
    torch.manual_seed(1)
    never = gradients(load_model(family), evaluate_first=False)
    torch.manual_seed(1)
    after = gradients(load_model(family), evaluate_first=True)
    assert never.keys() == after.keys()
    for name in never:
        assert never[name] is not None
        assert never[name].abs().sum() > 0
        assert torch.equal(never[name], after[name]), name


def test_the_repack_is_turned_off_in_every_layer(load_model):
    modules = base_model.quantized_modules(load_model("llama"))
    assert len(modules) == 14
    assert not any(module.support_avx512bf16_for_cpu for module in modules.values())


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="bitsandbytes' kernel for AVX-512 alone does it"
)
def test_bitsandbytes_dequantizes_rows_that_are_no_blocks_wrongly_on_a_cpu():
    # Once this fails, the refusal below has served its time.
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 65)[:, None]
    codes, state = quantize_4bit(W, blocksize=64, quant_type="nf4")
    by_rows = (dequantize_4bit(codes, state) - W).norm() / W.norm()
    state.shape = torch.Size((96, 64))
    by_blocks = (dequantize_4bit(codes, state).view(64, 96) - W).norm() / W.norm()
    assert by_blocks < 0.15
    assert by_rows > 2 * by_blocks
