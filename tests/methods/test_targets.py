"""Adapters go where they are told, and what cannot be trained is refused before anything is allocated."""

import pytest

from qlora import base_model, methods
from qlora.recipe import Lora
from qlora.system.errors import InputError
from tests.conftest import FAMILIES
from tests.methods.folders import IDS


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_layer_but_the_head(load_model, family):
    model = load_model(family)
    names = set(base_model.linear_names(model))
    adapted = {
        name.split(".lora_B")[0].removeprefix("base_model.model.")
        for name in methods.trainable(methods.attach(model, Lora(r=4))).first_to_move
    }
    assert adapted == names
    assert not any("lm_head" in name for name in adapted)


def test_named_modules_get_adapters_and_no_others(load_model):
    model = methods.attach(load_model("llama"), Lora(r=4, target_modules=["q_proj", "model.layers.1.mlp.up_proj"]))
    adapted = sorted(
        name.split(".lora_B")[0].removeprefix("base_model.model.") for name in methods.trainable(model).first_to_move
    )
    assert adapted == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]


@pytest.mark.parametrize("targets", [["q_proj", "qq_proj"], ["lm_head"], ["embed_tokens"], "nothing.*", ["proj"]])
def test_a_name_that_matches_nothing_lists_the_names_that_exist(load_model, targets):
    with pytest.raises(InputError) as caught:
        methods.attach(load_model("llama"), Lora(r=4, target_modules=targets))
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)
    assert repr(targets if isinstance(targets, str) else targets[-1]) in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"target_modules": ".*"}, "modules_to_save: [embed_tokens] trains all of it"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head' cannot have an adapter"),
        ({"exclude_modules": ["qproj"]}, "lora.exclude_modules: 'qproj' matches no linear layer"),
        ({"target_modules": ["q_proj"], "exclude_modules": "(.*)proj"}, "excludes every layer"),
        ({"layers_to_transform": [1, 2, 7]}, "no layer 2, 7"),
        ({"rank_pattern": {"q_proj": 2, "qproj": 4}}, "lora.rank_pattern: 'qproj' matches no layer"),
        ({"alpha_pattern": {"lm_head": 4}}, "lora.alpha_pattern: 'lm_head' matches no layer"),
        ({"modules_to_save": ["lm_heads"]}, "lora.modules_to_save: lm_heads: the model has no such module"),
        ({"modules_to_save": ["q_proj"]}, "model.layers.0.self_attn.q_proj: its 4-bit weights cannot be trained"),
        ({"modules_to_save": ["mlp"]}, "model.layers.0.mlp: its 4-bit weights cannot be trained"),
        ({"modules_to_save": ["rotary_emb"]}, "has no weights of its own"),
        ({"modules_to_save": ["embed_tokens", "model.embed_tokens.x"]}, "the model has no such module"),
        ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "lora.ensure_weight_tying: has no effect"),
        ({"bias": "all"}, "lora.bias all: LlamaForCausalLM has no bias"),
        ({"bias": "lora_only"}, "lora.bias lora_only: no layer that gets an adapter has a bias"),
        ({"lora_bias": True}, "lora.lora_bias: 14 of 14 layers have no bias"),
        ({"init_lora_weights": "pissa"}, "needs a 16-bit base"),
        ({"init_lora_weights": "eva", "r": 20}, "lora.r: 20 (EVA: up to twice that) is above"),
        ({"init_lora_weights": "loftq", "rank_pattern": {"q_proj": 65}}, "so at most 64"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_reason(load_model, lora, expected):
    with pytest.raises(InputError) as caught:
        methods.attach(load_model("llama"), Lora(**{"r": 4, **lora}))
    assert expected in str(caught.value)


def test_what_cannot_be_trained_in_16_bit_is_refused_with_the_reason(load_model):
    for lora, expected in (
        ({"modules_to_save": ["mlp", "up_proj"]}, "is inside another"),
        ({"modules_to_save": ["q_proj"], "target_modules": ["q_proj", "v_proj"]}, "target_modules names"),
        ({"modules_to_save": ["layers"]}, "ModuleList"),
        ({"modules_to_save": ["self_attn", "mlp"]}, "leaves no layer"),
        ({"init_lora_weights": "loftq"}, "the base is not quantized"),
    ):
        with pytest.raises(InputError, match=expected):
            methods.attach(load_model("llama", None), Lora(r=4, **lora))


def test_a_tie_that_peft_does_not_know_of_is_refused(load_model):
    with pytest.raises(InputError, match="PEFT only supports it for modules named embed_tokens and lm_head"):
        methods.attach(load_model("gpt2"), Lora(r=4, modules_to_save=["wte"], ensure_weight_tying=True))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "wte"])
def test_rows_and_the_whole_of_a_matrix_are_not_trained_at_once(load_model, name):
    model = load_model("gpt2" if name == "wte" else "llama")
    with pytest.raises(InputError, match=r"model\.new_tokens trains rows of it; leave one of the two out"):
        methods.attach(model, Lora(r=4, modules_to_save=[name]), token_ids=IDS)
