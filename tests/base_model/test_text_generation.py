"""A causal language model, and what is none."""

import pytest
import torch
import transformers

from qlora import base_model
from qlora.base_model import text_generation
from qlora.recipe import Model, Quantization
from qlora.system.errors import InputError
from tests.conftest import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_are_causal(load_model, tiny_model, family):
    checkpoint = base_model.find(Model(name_or_path=str(tiny_model(family))))
    text_generation.refuse_unsuitable(load_model(family), checkpoint)


def test_a_model_that_sees_its_answers_is_refused_before_training(make_recipe, tiny_model, tmp_path):
    """A BERT folder loads as BertLMHeadModel, whose attention goes both ways unless its config says is_decoder."""
    vocab_size = len(transformers.AutoTokenizer.from_pretrained(tiny_model("llama")))
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    for is_decoder in (False, True):
        folder = tmp_path / f"bert-{is_decoder}"
        config = transformers.BertConfig(vocab_size=vocab_size, **shape, is_decoder=is_decoder)
        transformers.BertLMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(folder)
        section = Model(name_or_path=str(folder))
        checkpoint = base_model.find(section)
        model = base_model.load(checkpoint, section, Quantization())
        if is_decoder:
            text_generation.refuse_unsuitable(model, checkpoint)
        else:
            with pytest.raises(InputError, match=r"BertLMHeadModel is not causal: .* is_decoder: false"):
                text_generation.refuse_unsuitable(model, checkpoint)
