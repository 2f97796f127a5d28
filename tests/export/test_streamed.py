"""Streamed from the files or held whole in memory: one model, to float32 rounding; and never more than its bound."""

import pytest
import torch
import transformers

from qlora import adapter, base_model
from qlora.export import merge, proof, streamed
from qlora.recipe import Lora, Model, Quantization
from tests.conftest import CONVERSATIONS, FAMILIES, encode, messages

CPU = torch.device("cpu")


def rows_of(tokenizer, count=6):
    return [encode(tokenizer, messages(turns)) for turns in CONVERSATIONS[:count]]


def source_of(checkpoint, section):
    return merge.plan(checkpoint, base_model.load_config(checkpoint, section), torch.float16).source


@pytest.fixture
def live_models(tiny_model, load_model, tmp_path):
    """Return make(family, quantization) -> (whole, streamed): the same base with the same strong random adapter."""

    def make(family, quantization=Quantization()):  # noqa: B008 (frozen)
        section = Model(name_or_path=str(tiny_model(family)))
        checkpoint = base_model.find(section)
        model = adapter.attach(load_model(family, quantization), Lora(r=4, lora_alpha=8))
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        adapter.save(model, tmp_path / "adapter", "x", None)
        bare = streamed.live(checkpoint, section, quantization, CPU, source_of(checkpoint, section))
        return model.eval(), adapter.load(bare, tmp_path / "adapter")

    return make


def assert_same(whole, other):
    """Both are proof.Live on the same rows."""
    for one, two in zip(whole.log_probabilities, other.log_probabilities, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=0)  # float32 sums in another order, of values up to 10
    assert other.base_scores.loss == pytest.approx(whole.base_scores.loss, abs=1e-5)
    assert other.base_scores.kl == pytest.approx(whole.base_scores.kl, rel=1e-4)
    assert whole.base_scores.kl > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens_at_once", [0, 10**6])
def test_the_live_model_is_the_same_streamed(live_models, tokenizer, family, tokens_at_once):
    whole, other = live_models(family)
    rows = rows_of(tokenizer)
    assert_same(proof.Live(whole, rows), proof.Live(other, rows, tokens_at_once))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_model_is_the_same_streamed(tiny_model, family):
    whole = proof.reload(tiny_model(family), CPU)
    other = streamed.exported(tiny_model(family), CPU)
    ids = torch.arange(3, 200)[None] * 7 % 512
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, other(ids).logits, atol=2e-5, rtol=1e-5)
