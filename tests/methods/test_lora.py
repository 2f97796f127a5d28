"""LoRA computes what its paper says, with the ranks and scaling of its section."""

import pytest
import torch
from peft.tuners.lora import dora
from safetensors.torch import load_file

from qlora import base_model, methods
from qlora.commands.train import train
from qlora.recipe import Adalora, Lora
from qlora.system.errors import InputError
from tests.conftest import some_slow
from tests.methods.test_methods import layers


def test_trainable_share_is_r_times_in_plus_out(load_model):
    model = methods.attach(load_model("llama"), Lora(r=4))
    expected = sum(4 * (m.in_features + m.out_features) for m in base_model.quantized_modules(model).values())
    assert base_model.num_parameters(model)[0] == expected


def test_qlora_forward_is_lora_on_the_dequantized_weight(saved):
    model, folder = saved("llama", Lora(r=4, lora_alpha=12))
    base_model.to_float32(model)
    read = methods.read(folder)
    name = "model.layers.0.mlp.up_proj"
    module = model.get_submodule(f"base_model.model.{name}")
    update = read.updates[name]
    assert update.scaling == 3.0
    A_RI, B_OR = update.A_RI.float(), update.B_OR.float()
    from bitsandbytes.functional import dequantize_4bit

    W_OI = dequantize_4bit(module.base_layer.weight.data, module.base_layer.weight.quant_state)
    x = torch.randn(5, 64)
    torch.testing.assert_close(module(x), x @ (W_OI + 3.0 * B_OR @ A_RI).T, atol=1e-4, rtol=1e-4)


def test_rslora_scales_by_the_root_of_r(saved):
    _, folder = saved("llama", Lora(r=4, lora_alpha=12, use_rslora=True))
    assert {update.scaling for update in methods.read(folder).updates.values()} == {6.0}


def test_patterns_set_the_rank_and_scaling_of_the_layers_they_match(load_model):
    section = Lora(r=4, lora_alpha=8, rank_pattern={"q_proj": 6, r"layers\.1\.mlp\..*": 2}, alpha_pattern={"q_proj": 3})
    model = methods.attach(load_model("llama"), section)
    found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers(model).items()}
    for name, expected in found.items():
        rank = 6 if "q_proj" in name else 2 if "layers.1.mlp" in name else 4
        assert expected == (rank, (3 if "q_proj" in name else 8) / rank)
    assert {rank for rank, _ in found.values()} == {2, 4, 6}


@pytest.mark.parametrize(
    ("family", "section", "said"),
    [
        ("llama", Lora(r=1_000_000), r"lora\.r: 1000000 is above .* so at most \d+"),
        ("gpt2", Lora(r=100_000), r"lora\.r: 100000"),
        ("llama", Lora(r=4, rank_pattern={"q_proj": 100_000}), r"lora\.rank_pattern 'q_proj': 100000 .*q_proj is"),
        ("llama", Adalora(init_r=100_000), r"adalora\.init_r: 100000"),
    ],
)
def test_a_rank_that_no_layer_can_have_is_refused_before_anything_is_allocated(load_model, family, section, said):
    model = load_model(family)
    with pytest.raises(InputError, match=said):
        methods.attach(model, section)
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_the_smaller_side_of_a_layer_is_the_largest_rank(load_model):
    model = load_model("llama")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    smaller = min(layer.in_features, layer.out_features)
    assert methods.attach(load_model("llama"), Lora(r=smaller, target_modules=["up_proj"]))
    with pytest.raises(InputError, match=f"at most {smaller}"):
        methods.attach(model, Lora(r=smaller + 1, target_modules=["up_proj"]))


def test_lora_plus_has_pefts_groups_of_parameters(load_model):
    from peft.optimizers import create_loraplus_optimizer

    section = Lora(r=4, loraplus_lr_ratio=16, modules_to_save=["lm_head"])
    model = methods.attach(load_model("llama"), section)
    named = dict(model.named_parameters())
    ours = {
        name: group["lr"]
        for group, one in zip(
            methods.trainable(model).optimizer_groups(named, 1e-4, 0.01), methods.trainable(model).groups, strict=True
        )
        for name in one.names
    }
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, weight_decay=0.01, loraplus_lr_ratio=16)
    names = {id(parameter): name for name, parameter in named.items()}
    assert ours == {names[id(p)]: group["lr"] for group in theirs.param_groups for p in group["params"]}
    assert sorted(set(ours.values())) == [1e-4, 16e-4]


def test_b_learns_so_many_times_faster_than_a(make_recipe, tmp_path, unplanned):
    steps = {}
    for ratio in (None, 8):
        recipe = make_recipe(
            lora={"r": 4, "loraplus_lr_ratio": ratio},
            quantization=None,
            output_dir=str(tmp_path / f"run{ratio}"),
            training={"max_steps": 1, "optim": "adamw_torch"},
        )
        run = train(recipe)
        steps[ratio] = load_file(run.adapter / methods.WEIGHTS)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    one, plus = (steps[ratio][name.format("B")].float().abs().median() for ratio in (None, 8))
    assert plus.item() == pytest.approx(8 * one.item(), rel=0.05)
    assert torch.equal(steps[None][name.format("A")], steps[8][name.format("A")])


@pytest.mark.parametrize("family", some_slow(["llama", "qwen2", "gpt2"], ["qwen2", "gpt2"]))
def test_the_norms_of_a_loaded_dora_are_computed_once_to_the_same_bits(saved, load_model, monkeypatch, family):
    _, folder = saved(family, Lora(r=4, use_dora=True))
    loaded = methods.load(load_model(family), folder)
    norms = [module for module in loaded.modules() if type(module) is dora.DoraLinearLayer]
    assert norms
    rows = torch.arange(4, 60)[None]

    def outputs():
        with torch.no_grad():
            return [loaded(input_ids=rows[:, :tokens]).logits for tokens in (1, 56, 1)]

    def pefts():
        own = [vars(layer).pop("forward") for layer in norms]
        found = outputs()
        for layer, forward in zip(norms, own, strict=True):
            layer.forward = forward
        return found

    for change in (lambda model: model, base_model.to_float32):  # the norms are of the dtype that is computed in
        change(loaded)
        expected = pefts()
        assert all(torch.equal(one, other) for one, other in zip(outputs(), expected, strict=True))
        with monkeypatch.context() as patch:
            patch.setattr(
                dora.DoraLinearLayer, "get_weight_norm", lambda *args, **kwargs: pytest.fail("computed again")
            )
            patch.setattr(
                dora.DoraLinearLayer, "get_lora_weight", lambda *args, **kwargs: pytest.fail("computed again")
            )
            assert torch.equal(outputs()[1], expected[1])
