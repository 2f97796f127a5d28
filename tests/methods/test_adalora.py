"""AdaLoRA: its schedule, its folder, and what it does to a weight."""

import pytest
import torch

from qlora import base_model, methods
from qlora.recipe import Adalora
from qlora.system.errors import InputError

SECTION = Adalora(init_r=6, target_r=3, lora_alpha=12, tinit=1, tfinal=0.5)


def test_e_moves_first_and_nothing_else_needs_to(load_model):
    found = methods.trainable(methods.attach(load_model("llama"), SECTION))
    assert found.summary == "AdaLoRA, ranks 6 to 3 on average"
    assert len(found.first_to_move) == len(base_model.linear_names(load_model("llama")))
    assert all(".lora_E." in name and not parameter.any() for name, parameter in found.first_to_move.items())
    assert found.schedule.changes
    assert found.schedule.measured() == {"mean_rank": 6.0}


def test_shares_of_the_steps_become_steps_and_no_step_left_is_refused(load_model):
    model = methods.attach(load_model("llama"), SECTION)
    schedule = methods.trainable(model).schedule
    with pytest.raises(InputError, match=r"tinit 1 and adalora.tfinal 1 leave none of 2 steps"):
        schedule.begin(2)
    schedule.begin(8)
    config = model.peft_config["default"]
    assert (config.tinit, config.tfinal, config.total_step) == (1, 4, 8)


def test_the_penalty_is_zero_for_orthogonal_factors_and_only_for_those(load_model):
    schedule = methods.trainable(methods.attach(load_model("llama"), SECTION)).schedule
    Q_RI = torch.linalg.qr(torch.randn(64, 6)).Q.T
    named = [("x.lora_A.default", Q_RI), ("x.lora_B.default", Q_RI.T), ("x.lora_E.default", torch.ones(6, 1))]
    assert schedule.penalty(named).item() == pytest.approx(0, abs=1e-5)
    # |2 Q (2 Q)' - 1| = |3 1| = 3 sqrt(6), for one of two factors, times orth_reg_weight = 0.5
    named[0] = ("x.lora_A.default", 2 * Q_RI)
    assert schedule.penalty(named).item() == pytest.approx(0.5 * 3 * 6**0.5 / 2, rel=1e-5)


def test_its_state_goes_into_another_model_and_back(load_model):
    one, other = (methods.attach(load_model("llama"), SECTION) for _ in range(2))
    ids = torch.arange(4, 60)[None]
    schedules = [methods.trainable(model).schedule for model in (one, other)]
    for schedule in schedules:
        schedule.begin(8)
    one.train()
    for step in (1, 2, 3):
        one(input_ids=ids, labels=ids).loss.backward()
        schedules[0].after_step(step)
        one.zero_grad()
    tensors, values = schedules[0].state()
    assert tensors
    assert values
    schedules[1].restore(tensors, values)
    again, same = schedules[1].state()
    assert same == values
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert schedules[1].measured() == schedules[0].measured() != {"mean_rank": 6.0}


def test_its_update_is_b_e_a_over_the_rank_it_began_with(saved):
    model, folder = saved("llama", SECTION)
    found = methods.read(folder)
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    A, B, E = (getattr(layer, f"lora_{letter}")["default"].detach().float() for letter in "ABE")
    expected = 12 / 6 * B @ (E * A)
    torch.testing.assert_close(found.updates[name].merged(torch.zeros(128, 64)), expected, atol=1e-4, rtol=1e-4)
    assert found.kind == "AdaLoRA"
    with pytest.raises(InputError, match="has AdaLoRA, so it cannot be added"):
        found.refuse_more_than_low_rank("cannot be added")
    assert methods.describe(found.config).size == "r=3"
