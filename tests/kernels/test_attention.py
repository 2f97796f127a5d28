"""A packed row computes what its documents compute alone: logits, loss and gradients; and nothing crosses over."""

import json

import pytest
import torch

from qlora import adapter, base_model
from qlora.commands.train import train
from qlora.data import pack
from qlora.errors import InputError
from qlora.kernels.attention import refuse_unsupported, within_documents
from qlora.recipe import Lora
from qlora.sft import _join_rows
from tests.conftest import CONVERSATIONS, FAMILIES, encode, messages

PACKABLE = [family for family in FAMILIES if family != "gemma2"]
TURNS = [*CONVERSATIONS[:4], [("user", "Count, please."), ("assistant", "1 2 3 4 5 6 7 8 9")]]


def prepare(load_model, tokenizer, family):
    """Return (PeftModel in float32 with a random adapter, examples, their packed rows as one batch)."""
    model = base_model.to_float32(load_model(family))
    model = adapter.attach(model, Lora(r=4))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    examples = [encode(tokenizer, messages(turns)) for turns in TURNS]
    rows = pack(examples, 96)
    assert 1 < len(rows) < len(examples)
    return model.train(), examples, _join_rows([row.__dict__ for row in rows]), rows


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_loss_and_gradients_are_those_of_the_rows_alone(load_model, tokenizer, family):
    model, examples, batch, _ = prepare(load_model, tokenizer, family)
    total = sum(label != -100 for example in examples for label in example.labels)

    def loss_of(labels, **inputs):
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / total

    alone = 0.0
    for example in examples:
        loss = loss_of(torch.tensor([example.labels]), input_ids=torch.tensor([example.input_ids]))
        loss.backward()
        alone += loss.item()
    expected = gradients(model)
    with within_documents(model):
        loss = loss_of(batch.pop("labels"), **batch)
        loss.backward()
    assert loss.item() == pytest.approx(alone, rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5 * expected[name].abs().max().item())


@pytest.mark.parametrize("family", PACKABLE)
def test_a_document_does_not_see_its_neighbours(load_model, tokenizer, family):
    model, _, batch, rows = prepare(load_model, tokenizer, family)
    first = rows[0].segments[0]
    model.eval()
    with torch.no_grad(), within_documents(model):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        before = model(**inputs, use_cache=False).logits
        changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
        changed["input_ids"][0, :first] = 7
        after = model(**changed, use_cache=False).logits
    assert torch.equal(before[0, first:], after[0, first:])
    assert not torch.equal(before[0, :first], after[0, :first])


def test_a_sliding_window_holds_within_a_document(load_model, tokenizer):
    model, _, batch, rows = prepare(load_model, tokenizer, "mistral")
    model.eval()
    for layer in model.get_base_model().model.layers:
        layer.self_attn.sliding_window = 4
    model.config.sliding_window = model.get_base_model().config.sliding_window = 4
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([rows[0].input_ids[: rows[0].segments[0]]])).logits
        with within_documents(model):
            found = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        model.config.sliding_window = model.get_base_model().config.sliding_window = None
        for layer in model.get_base_model().model.layers:
            layer.self_attn.sliding_window = None
        unlimited = model(input_ids=torch.tensor([rows[0].input_ids[: rows[0].segments[0]]])).logits
    torch.testing.assert_close(found[:, : rows[0].segments[0]], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, unlimited, atol=1e-2)


def test_the_attention_is_put_back(load_model):
    model = load_model("llama")
    before = model.config._attn_implementation
    with within_documents(model):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before


def test_an_architecture_that_cannot_be_packed_is_refused(make_recipe):
    with pytest.raises(InputError, match="caps its attention logits"):
        train(make_recipe("gemma2", data={"packing": True}))
    with pytest.raises(InputError, match="linear_attention layers carry state"):
        refuse_unsupported(LinearAttention())


class LinearAttention:
    layer_types = ("full_attention", "linear_attention")

    def get_text_config(self):
        return self


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_run_trains_on_every_token_once_and_evaluates_as_an_unpacked_one(make_recipe, tmp_path, family):
    found = {}
    for packing in (True, False):
        data = {"packing": packing, "max_length": 100}
        training = {"max_steps": None, "num_train_epochs": 1.0, "per_device_train_batch_size": 2, "learning_rate": 1e-9}
        recipe = make_recipe(family, data=data, training=training, output_dir=str(tmp_path / str(packing)))
        run = train(recipe)
        records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
        report = json.loads(run.data_report_file.read_text())
        found[packing] = (records[-2]["tokens"], records[-1]["eval_loss"], len(records) - 1, report)
    (packed_tokens, packed_loss, packed_steps, report), (tokens, loss, steps, _) = found[True], found[False]
    assert packed_tokens == tokens == report["tokens"]["total"]
    assert packed_loss == pytest.approx(loss, rel=1e-3)
    assert packed_steps == report["steps_per_epoch"] < steps
    assert 0.8 < report["packing_efficiency"] <= 1
