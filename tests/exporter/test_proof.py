"""The proof passes what is right and fails what is wrong: another base, a lost adapter, a rounded embedding, noise."""

import pytest
import torch

from qlora import base_model, methods
from qlora.exporter import proof, report
from qlora.recipe import Lora
from tests.conftest import CONVERSATIONS, encode, messages


@pytest.mark.parametrize(
    ("modules", "names"),
    [(7, ["trained (quantized + adapter, live)", "exported (float16, dequantized base)"]),
     (0, ["trained (base + adapter, live)", "exported (float16)"])],
)  # fmt: skip
def test_the_table_speaks_of_a_dequantized_base_only_where_one_was_quantized(modules, names):
    scored = {"loss": 1.0, "kl": 0.0, "top1": 1.0}
    told = {"quantized": {"modules": modules}, "base": "dequantized", "dtype": "float16", "live_model": "run", "live": scored,
            "merged": scored, "base_model": scored}  # fmt: skip
    assert [name for name, *_ in report.scores(told)] == [*names, "base, without the adapter"]


@pytest.fixture
def live_and_merged(load_model, tokenizer):
    """Return (Live, a float32 model with the faithful merge): NF4 base with a strong random adapter."""
    model = methods.attach(load_model("llama"), Lora(r=4, lora_alpha=8))
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = [encode(tokenizer, messages(turns)) for turns in CONVERSATIONS[:6]]
    live = proof.Live(model.eval(), rows)
    from bitsandbytes.functional import dequantize_4bit

    plain = load_model("llama", None).float()
    with torch.no_grad():
        for name in base_model.linear_names(plain):
            layer = model.get_submodule(f"base_model.model.{name}")
            weight = layer.base_layer.weight
            base = dequantize_4bit(weight.data, weight.quant_state)
            plain.get_submodule(name).weight.copy_(base + layer.get_delta_weight("default"))
    return live, plain


def judge(live, model, dtype="float16"):
    return proof.failures(live.scores, live.compare(model), live.base_scores, dtype, live.num_trained)


def test_the_faithful_merge_passes_exactly(live_and_merged):
    live, merged = live_and_merged
    scores = live.compare(merged)
    assert scores.kl < 1e-7  # float32 sums in another order
    assert scores.top1 == 1
    assert scores.loss == pytest.approx(live.scores.loss, abs=1e-5)
    assert judge(live, merged, "float32") == []


@pytest.mark.parametrize(("dtype", "many"), [("float32", 320), ("float16", 128), ("bfloat16", 128)])
def test_the_loss_of_few_tokens_may_be_as_far_apart_as_rounding_moves_it(dtype, many):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 500, generator=generator, dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    rounded = (logits + proof.KL_LIMIT[dtype] ** 0.5 * torch.randn(logits.shape, generator=generator)).log_softmax(-1)
    assert (log_p.exp() * (log_p - rounded)).sum(-1).mean() < proof.KL_LIMIT[dtype]
    tokens = torch.multinomial(log_p.exp(), 1, generator=generator)
    apart = (log_p - rounded).gather(1, tokens)[:, 0]
    for count in (5, 14):
        furthest = apart[: 4000 // count * count].view(-1, count).mean(1).abs().max()
        assert furthest < proof.loss_limit(dtype, count)
        assert furthest > proof.loss_limit(dtype, 1000)  # the limit for many tokens refuses what is right
    assert proof.loss_limit(dtype, many) == proof.loss_limit(dtype, 10**6) < proof.loss_limit(dtype, many - 1)


def test_the_faithful_merge_in_float16_passes(live_and_merged):
    live, merged = live_and_merged
    assert judge(live, merged.half().float()) == []


def test_the_original_base_with_the_adapter_fails(live_and_merged, load_model, tiny_model):
    live, merged = live_and_merged
    quantized, original = load_model("llama"), load_model("llama", None).float()
    from bitsandbytes.functional import dequantize_4bit

    with torch.no_grad():  # W + delta instead of dequantize(NF4(W)) + delta
        for name in base_model.linear_names(original):
            weight = quantized.get_submodule(name).weight
            base = dequantize_4bit(weight.data, weight.quant_state).float()
            merged.get_submodule(name).weight.add_(original.get_submodule(name).weight - base)
    assert any("KL(trained, exported)" in failure for failure in judge(live, merged))


def test_the_bare_base_fails_both_ways(live_and_merged, load_model):
    live, _ = live_and_merged
    found = judge(live, load_model("llama", None).float(), "bfloat16")
    assert any("KL(trained, exported)" in failure for failure in found)
    assert any("no closer to the trained model" in failure for failure in found)


def test_one_wrong_layer_fails(live_and_merged):
    live, merged = live_and_merged
    with torch.no_grad():
        merged.model.layers[1].mlp.down_proj.weight.mul_(1.05)
    assert judge(live, merged) != []


def test_an_embedding_rounded_to_nf4_fails(live_and_merged):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    live, merged = live_and_merged
    with torch.no_grad():
        weight = merged.model.embed_tokens.weight
        weight.copy_(dequantize_4bit(*quantize_4bit(weight.data, blocksize=64, quant_type="nf4")))
    assert judge(live, merged) != []


def test_weights_that_are_not_finite_fail(live_and_merged):
    live, merged = live_and_merged
    with torch.no_grad():
        merged.model.norm.weight[0] = float("nan")
    assert judge(live, merged) != []


def test_rows_are_as_many_as_the_memory_set_aside_holds(tokenizer):
    rows = [encode(tokenizer, messages(turns)) for turns in CONVERSATIONS]
    assert proof.proof_rows(rows, vocab_size=512) == rows
    assert len(proof.proof_rows(rows, vocab_size=10**9)) == 1
    few = proof.proof_rows(rows, vocab_size=1_000_000)
    assert 1 <= len(few) < len(rows)
    assert sum(len(row.input_ids) - 1 for row in few) * 4 * 1_000_000 <= 256 * 2**20
