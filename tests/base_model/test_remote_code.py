"""Models whose code comes with them and knows less than transformers' own: they train, score and export all the same."""

import json
import shutil

import pytest
import torch

from qlora import base_model
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.recipe import Model
from qlora.system.errors import InputError
from tests.conftest import some_slow

CODE = """
from transformers import GenerationMixin, LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
import torch


class OldForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ARGUMENTS):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden))
"""
SIGNATURES = {
    "nothing": "input_ids, attention_mask=None",
    "no logits_to_keep": "input_ids, attention_mask=None, **kwargs",
    "all of them, but no **kwargs": "input_ids, attention_mask=None, use_cache=None, output_attentions=None, labels=None",
}


@pytest.fixture
def with_code(tiny_model, tmp_path):
    """Return make(signature) -> a copy of the tiny Llama whose class is in its folder."""

    def make(signature):
        folder = shutil.copytree(tiny_model("llama"), tmp_path / "base")
        (folder / "modeling_old.py").write_text(CODE.replace("ARGUMENTS", signature))
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_old.OldForCausalLM"}
        config["architectures"] = ["OldForCausalLM"]
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("signature", some_slow(SIGNATURES, but=["nothing"]))
def test_a_forward_with_fewer_arguments_takes_the_plain_path(with_code, make_recipe, tmp_path, signature):
    model = {"name_or_path": str(with_code(SIGNATURES[signature])), "trust_remote_code": True}
    run = train(make_recipe(model=model, training={"max_steps": 4, "learning_rate": 3e-2}))
    report = export(run.path, tmp_path / "out", dtype="float32")
    assert report["verified"]
    assert (tmp_path / "out" / "modeling_old.py").is_file()


def test_the_wanted_logits_are_those_of_the_whole(with_code, load_model):
    section = Model(name_or_path=str(with_code(SIGNATURES["nothing"])), trust_remote_code=True)
    model, plain = base_model.load(base_model.find(section), section, None), load_model("llama", None)
    ids = torch.arange(4, 24)[None]
    for keep in (0, 1, torch.tensor([2, 5, 19])):
        assert torch.equal(model(ids, logits_to_keep=keep).logits, plain(ids, logits_to_keep=keep).logits)
    with pytest.raises(InputError, match="the forward of OldForCausalLM takes no position_ids"):
        model(ids, position_ids=ids)
