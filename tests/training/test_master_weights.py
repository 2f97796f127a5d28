"""Small updates are not lost in bf16, and what is to be held is held."""

from typing import get_args

import pytest
import torch

from qlora import methods
from qlora.kernels import groups
from qlora.recipe import Lora, Training
from qlora.training.master_weights import MasterWeights
from tests.training.conftest import trained


@pytest.mark.parametrize("optim", get_args(Training.model_fields["optim"].annotation))
def test_no_optimizer_moves_what_pissa_starts_from(fit, load_model, optim):
    lora = Lora(r=64, init_lora_weights="pissa", target_modules=["q_proj"])  # 128 x 64: enough for 8-bit states
    start = trained(methods.attach(load_model("llama", None), lora, 0))
    model, _, _ = fit(lora=lora, quantization=None, max_steps=3, optim=optim, weight_decay=0.1)
    for name, tensor in trained(model).items():
        dim = 0 if ".lora_A." in name else 1
        (new, held), (old, first) = tensor.split(64, dim), start[name].split(64, dim)
        assert torch.equal(held, first), name
        assert not torch.equal(new, old), name


def test_small_updates_are_not_lost_in_bfloat16(fit):
    # At 1e-5 Adam's step is a 1/1000 of a typical A (0.05): below half a bf16 digit, so bf16 weights alone stand still.
    steps = 40
    model, _, _ = fit(max_steps=steps, learning_rate=1e-5, optim="adamw_torch", per_device_train_batch_size=8)
    start, _, _ = fit(max_steps=1, learning_rate=1e-12, optim="adamw_torch", per_device_train_batch_size=8)
    moved = [(trained(model)[n] != a).float().mean().item() for n, a in trained(start).items() if ".lora_A." in n]
    assert sum(moved) / len(moved) > 0.3
    # and what the model holds is the float32 master, rounded once
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.slow
def test_small_updates_of_new_tokens_rows_are_not_lost_in_bfloat16(fit, load_model):
    # numbers over 1/16 lie 2**-11 = 4.9e-4 apart: a step of 5e-5 alone rounds to nothing, twenty of them to one or two
    model, _, _ = fit(max_steps=20, learning_rate=5e-5, optim="adamw_torch", token_ids=[1, 2])
    base = load_model("llama")
    for module, before in (("model.embed_tokens", base.model.embed_tokens), ("lm_head", base.lm_head)):
        before = before.weight[[1, 2]].float()
        name = f"base_model.model.{module}.token_adapter.trainable_tokens_delta.default"
        moved = (trained(model)[name] != before)[before.abs() > 1 / 16]
        assert moved.float().mean() > 0.5, module


@pytest.mark.parametrize("numbers", [1, 200, 10**6])  # of a group: a tensor, two or three, all
def test_gradients_in_groups_are_summed_and_clipped_as_one_by_one(monkeypatch, numbers):
    monkeypatch.setattr(groups, "NUMBERS", numbers)
    original = groups.of
    monkeypatch.setattr(groups, "of", lambda sizes, on_gpu: original(sizes, True))
    generator = torch.Generator().manual_seed(0)
    live = [torch.nn.Parameter(torch.randn(n, 8, generator=generator).bfloat16()) for n in (5, 20, 3, 9)]
    held = [None, slice(2, 4), None, None]
    masters = MasterWeights(live, held)
    sums = [torch.zeros(p.shape) for p in live]
    for _ in range(3):
        for at, parameter in enumerate(live[:3]):  # the last has none
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
            gradient = parameter.grad.float()
            if held[at] is not None:
                gradient[held[at]] = 0
            sums[at] += gradient
        masters.take_gradients()
        assert all(parameter.grad is None for parameter in live)
    assert all(torch.equal(master.grad, total) for master, total in zip(masters.masters[:3], sums, strict=False))
    assert masters.masters[3].grad is None
    reference = [torch.nn.Parameter(torch.zeros(p.shape)) for p in live[:3]]
    for parameter, total in zip(reference, sums, strict=False):
        parameter.grad = total
    norm = torch.nn.utils.clip_grad_norm_(reference, 1.0)
    assert torch.equal(masters.clip_gradients(1.0), norm)
    assert norm > 1
    assert all(torch.equal(m.grad, p.grad) for m, p in zip(masters.masters, reference, strict=False))


def test_groups_hold_every_tensor_once_and_no_more_than_they_may():
    sizes = [groups.NUMBERS // 3] * 7 + [2 * groups.NUMBERS, 5]
    slices = groups.of(sizes, on_gpu=True)
    assert [at for part in slices for at in range(len(sizes))[part]] == list(range(len(sizes)))
    assert [part.stop - part.start for part in slices] == [3, 3, 1, 1, 1]
    assert len(groups.of(sizes, on_gpu=False)) == len(sizes)
    assert groups.of([], on_gpu=True) == []
