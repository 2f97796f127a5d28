"""(IA)3: where its factors are, and what is refused; test_each_method.py has what they compute."""

import pytest
import torch

from qlora import methods
from qlora.recipe import Ia3
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


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (Ia3(target_modules=["nowhere"]), "ia3.target_modules: 'nowhere' matches no linear layer"),
        (Ia3(feedforward_modules=["nowhere"]), "ia3.feedforward_modules: 'nowhere' is none of the layers"),
    ],
)
def test_what_cannot_be_is_refused(load_model, section, said):
    with pytest.raises(InputError, match=said):
        methods.attach(load_model("llama"), section)


def test_an_architecture_without_a_choice_of_its_own_must_name_its_layers(load_model):
    model = load_model("llama")
    model.config.model_type = "unheard_of"
    with pytest.raises(InputError, match=r"ia3.target_modules: not known for unheard_of models; name the layers"):
        methods.attach(model, Ia3())
