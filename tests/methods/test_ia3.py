"""(IA)3: where its factors are, what they compute, and what a merge makes of them."""

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model

from qlora import base_model, methods
from qlora.recipe import Ia3, Lora
from qlora.system.errors import InputError

IDS = torch.arange(4, 60)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(("family", "layers", "by_inputs"), [("llama", 6, 2), ("gpt2", 4, 2), ("qwen2", 6, 2)])
def test_it_starts_as_the_base_with_a_factor_where_the_paper_has_one(load_model, family, layers, by_inputs):
    expected = logits(load_model(family))
    model = methods.attach(load_model(family), Ia3())
    assert torch.equal(logits(model), expected)
    found = methods.trainable(model)
    assert found.summary == f"(IA)3, {layers} layers"
    assert found.names == list(found.first_to_move)
    assert sum(len(factor) == 1 for factor in found.first_to_move.values()) == by_inputs
    assert all((factor == 1).all() and factor.dtype == torch.bfloat16 for factor in found.first_to_move.values())


def test_it_computes_in_float32_what_peft_computes(load_model):
    ours = methods.attach(base_model.to_float32(load_model("llama")), Ia3())
    theirs = get_peft_model(base_model.to_float32(load_model("llama")), IA3Config(task_type="CAUSAL_LM"))
    factors = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=1, std=0.2)
            factors[name].data.copy_(parameter)
    found = []
    for model in (ours, theirs):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append([loss, *(p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_plain_peft_opens_the_folder(saved, load_model):
    model, folder = saved("llama", Ia3())
    theirs = PeftModel.from_pretrained(base_model.to_float32(load_model("llama")), folder)
    torch.testing.assert_close(logits(theirs), logits(base_model.to_float32(model)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_loaded_again_it_computes_the_same_and_switched_off_the_base(saved, load_model, family):
    model, folder = saved(family, Ia3())
    loaded = methods.load(load_model(family), folder)
    assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(load_model(family)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_merged_layer_is_the_layer_with_its_bias(saved, family):
    model, folder = saved(family, Ia3(), quantized=False)
    base_model.to_float32(model)
    updates = methods.read(folder).updates
    assert len(updates) in (4, 6)
    for name, update in updates.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        base = layer.base_layer
        W_OI = base.weight.T if base_model.is_conv1d(base) else base.weight
        x = torch.randn(5, W_OI.shape[1], generator=torch.Generator().manual_seed(0))
        bias = None if base.bias is None else update.merged_bias(base.bias.detach())
        merged = torch.cat([update.merged(W_OI.detach()[rows], rows) for rows in (slice(0, 7), slice(7, None))])
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, merged, bias), atol=1e-5, rtol=1e-4)
        assert not update.is_zero()


def test_several_lie_on_one_base_and_lora_does_not_lie_beside_them(saved, load_model, tmp_path):
    _, folder = saved("llama", Ia3())
    model = methods.load(load_model("llama"), folder)
    one = logits(model)
    other = methods.attach(load_model("llama"), Ia3(target_modules=["q_proj"], feedforward_modules=["q_proj"]))
    for factor in methods.trainable(other).first_to_move.values():
        factor.data.fill_(0.5)
    methods.save(other, tmp_path / "other", "base", None)
    methods.add(model, tmp_path / "other", "other")
    methods.activate(model, "other")
    assert torch.equal(logits(model), logits(other))
    methods.activate(model, "default")
    assert torch.equal(logits(model), one)
    _, lora = saved("llama-tied", Lora(r=4))
    with pytest.raises(InputError, match="LoRA cannot be loaded beside IA3; open it by itself"):
        methods.add(model, lora, "lora")


@pytest.mark.parametrize(
    ("section", "tokens", "said"),
    [
        (Ia3(), [500], "model.new_tokens: PEFT's .IA.3 trains no rows"),
        (Ia3(target_modules=["nowhere"]), [], "ia3.target_modules: 'nowhere' matches no linear layer"),
        (Ia3(feedforward_modules=["nowhere"]), [], "ia3.feedforward_modules: 'nowhere' is none of the layers"),
    ],
)
def test_what_cannot_be_is_refused(load_model, section, tokens, said):
    with pytest.raises(InputError, match=said):
        methods.attach(load_model("llama"), section, token_ids=tokens)


def test_an_architecture_without_a_choice_of_its_own_must_name_its_layers(load_model):
    model = load_model("llama")
    model.config.model_type = "unheard_of"
    with pytest.raises(InputError, match=r"ia3.target_modules: not known for unheard_of models; name the layers"):
        methods.attach(model, Ia3())
