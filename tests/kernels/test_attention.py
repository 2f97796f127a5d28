"""A packed row computes what its documents compute alone: logits, loss and gradients; and nothing crosses over."""

import inspect
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn.attention.varlen import varlen_attn

from qlora import base_model, kernels, methods
from qlora.commands.train import train
from qlora.data import pack
from qlora.kernels import attention
from qlora.kernels.attention import refuse_unsupported, within_documents
from qlora.recipe import Lora
from qlora.system.errors import InputError
from qlora.training.objectives.supervised import join_rows
from tests.conftest import CONVERSATIONS, FAMILIES, encode, messages, recipe_in, some_slow

PACKABLE = [family for family in FAMILIES if family != "gemma2"]
TURNS = [*CONVERSATIONS[:4], [("user", "Count, please."), ("assistant", "1 2 3 4 5 6 7 8 9")]]


def prepare(load_model, tokenizer, family):
    """Return (PeftModel in float32 with a random adapter, examples, their packed rows as one batch)."""
    model = base_model.to_float32(load_model(family))
    model = methods.attach(model, Lora(r=4))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    examples = [encode(tokenizer, messages(turns)) for turns in TURNS]
    rows = pack(examples, 96)
    assert 1 < len(rows) < len(examples)
    return model.train(), examples, join_rows([row.__dict__ for row in rows]), rows


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


PACKED = [*((family, False) for family in PACKABLE), ("llama", True), ("gpt2", True)]


@pytest.mark.parametrize(
    ("family", "in_one_call"),
    some_slow(PACKED, but=[("llama", False), ("gpt2", False), ("phi3", False), ("gpt2", True)]),
)
def test_packed_loss_and_gradients_are_those_of_the_rows_alone(load_model, tokenizer, monkeypatch, family, in_one_call):
    model, examples, batch, _ = prepare(load_model, tokenizer, family)
    calls = []
    if in_one_call:
        monkeypatch.setattr(attention, "takes_one_call", lambda *args, **kwargs: True)
        monkeypatch.setattr(attention, "varlen_attn", lambda *a, **kw: calls.append(1) or reference_varlen(*a, **kw))
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
    assert len(calls) == (2 if in_one_call else 0)  # one a layer
    assert loss.item() == pytest.approx(alone, rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5 * expected[name].abs().max().item())


# ---- all documents in one call ---------------------------------------------------------------------------------------


def reference_varlen(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """What torch documents of varlen_attn, in float32 and by the definition of attention."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32  # all that the kernel takes
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = (math.inf if size == -1 else size for size in window_size)
    outputs = []
    for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        q, k, v = (x[start:end].float().transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        ahead = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]  # of the key before the query
        scores = scores.masked_fill((ahead > right) | (-ahead > left), -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


def test_the_reference_has_the_signature_of_varlen_attn():
    ours, theirs = (inspect.signature(f).parameters for f in (reference_varlen, varlen_attn))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_call_is_one_call_a_document(monkeypatch, num_kv_heads, window, scaling):
    monkeypatch.setattr(attention, "varlen_attn", reference_varlen)
    module = SimpleNamespace(num_key_value_groups=4 // num_kv_heads)
    segments = [5, 1, 7, 12]
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, sum(segments), 8, requires_grad=True) for heads in (4, num_kv_heads, num_kv_heads)]
    grad_output = torch.randn(1, sum(segments), 4, 8)
    found = {}
    for path in (attention.in_one_call, attention.one_by_one):
        output = path(module, *inputs, segments, window, scaling=scaling, dropout=0.0)
        found[path] = [output, *torch.autograd.grad(output, inputs, grad_output)]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)  # float32, sums in another order
    unlimited = attention.one_by_one(module, *inputs, segments, None, scaling=scaling)
    assert torch.allclose(unlimited, output, atol=1e-4) == (window is None or window >= max(segments))


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("settings", [{}, {"scaling": 0.3}, {"is_causal": False}, {"mask": True}])
def test_without_flash_attention_no_grouped_queries_are_asked_for(monkeypatch, num_kv_heads, settings):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 9, 8) for heads in (4, num_kv_heads, num_kv_heads))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=4 // num_kv_heads)
    mask = torch.rand(2, 1, 9, 9) > 0.3 if settings.pop("mask", False) else None
    kept = []
    original = torch.nn.functional.scaled_dot_product_attention
    found = {}
    for lacks in (False, True):
        monkeypatch.setattr(attention, "_lacks_flash", lambda _, lacks=lacks: lacks)
        kept.clear()
        with monkeypatch.context() as patch:
            patch.setattr(
                torch.nn.functional,
                "scaled_dot_product_attention",
                lambda q, k, v, **kw: kept.append((k.shape[1], kw.get("enable_gqa"))) or original(q, k, v, **kw),
            )
            found[lacks], _ = attention.sdpa(module, query, key, value, mask, **settings)
    assert kept == [(4, None)]
    assert torch.allclose(found[True], found[False], atol=1e-6)


def test_which_cards_lack_flash_attention(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, lacking in (((7, 5), {torch.float16, torch.float32}), ((8, 6), {torch.float32})):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        for dtype in (torch.float16, torch.float32):
            query = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)
            assert attention._lacks_flash(query) == (dtype in lacking)
    assert not attention._lacks_flash(torch.zeros(1))
    assert transformers.AttentionInterface()["sdpa"] is attention.sdpa


def test_offsets_are_made_once_a_batch():
    cpu = torch.device("cpu")
    offsets = attention._offsets((3, 1, 2), cpu)
    assert offsets.tolist() == [0, 3, 4, 6]
    assert attention._offsets((3, 1, 2), cpu) is offsets
    assert attention._offsets((3, 3), cpu).tolist() == [0, 3, 6]


AMPERE, TURING = (8, 6), (7, 5)


@pytest.mark.parametrize(
    ("taken", "case"),
    [
        (True, {}),
        (True, {"dtype": torch.float16}),
        (True, {"capability": (8, 0)}),
        (True, {"capability": (12, 0)}),
        (True, {"is_causal": True}),
        (True, {"head_dim": 80}),
        (True, {"head_dim": 256}),
        (False, {"head_dim": 100}),
        (False, {"head_dim": 224}),
        (False, {"head_dim": 512}),
        (False, {"value_dim": 32}),
        (False, {"dtype": torch.float32}),
        (False, {"capability": TURING}),
        (False, {"capability": None}),
        (False, {"dropout": 0.1}),
        (False, {"is_causal": False}),
        (False, {"softcap": 50.0}),
        (False, {"position_bias": torch.zeros(1)}),
    ],
    ids=str,
)
def test_one_call_is_taken_only_where_it_computes_the_same(taken, case):
    settings = {"capability": AMPERE, "dropout": 0.0, "scaling": 0.125, **case}
    dtype, head_dim = settings.pop("dtype", torch.bfloat16), settings.pop("head_dim", 64)
    query = torch.empty(1, 4, 3, head_dim, dtype=dtype)
    value = torch.empty(1, 2, 3, settings.pop("value_dim", head_dim), dtype=dtype)
    assert attention.takes_one_call(SimpleNamespace(), query, value, **settings) is taken
    assert (
        not attention.takes_one_call(SimpleNamespace(is_causal=False), query, value, **settings) or "is_causal" in case
    )


def test_a_cpu_has_no_capability():
    assert attention._capability(torch.device("cpu")) is None


# ---- what is kept apart ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", some_slow(PACKABLE, but=("llama", "gpt2", "phi3")))
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
    with pytest.raises(InputError, match="uses attention logit softcapping"):
        train(make_recipe("gemma2", data={"packing": True}))
    with pytest.raises(InputError, match="linear_attention layers would carry state"):
        refuse_unsupported(LinearAttention())


class LinearAttention:
    layer_types = ("full_attention", "linear_attention")

    def get_text_config(self):
        return self


@pytest.mark.parametrize("family", some_slow(["llama", "gpt2"], ["gpt2"]))
@pytest.mark.usefixtures("unplanned")
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


def longrope():
    """Return a small Phi-3 whose rows over 32 tokens have other rotary factors."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0]}
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = transformers.Phi3Config(
        **sizes, **heads, max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=rope,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config).eval()


@torch.no_grad()
def beside(model, long):
    """Return how far the logits of a row of ten tokens are from its own beside one of `long` tokens, as a share."""
    rows = [torch.randint(3, 128, (1, length)) for length in (10, long)]
    alone = model(input_ids=rows[0], use_cache=False).logits
    positions = torch.cat([torch.arange(10), torch.arange(long)])[None]
    with within_documents(model):
        ids = torch.cat(rows, dim=1)
        joined = model(input_ids=ids, position_ids=positions, segments=[10, long], use_cache=False).logits[:, :10]
    return float((joined - alone).norm() / alone.norm())


def test_rows_of_longrope_are_joined_only_where_none_has_other_factors():
    model = longrope()
    assert beside(model, 32) < 1e-5 < 0.01 < beside(model, 33)  # should the second be small too, the refusal can go
    recipe = SimpleNamespace(kernels="auto", data=SimpleNamespace(max_length=32))
    assert kernels.setting_of(recipe, model.config) == "auto"
    recipe.data.max_length = 33
    assert kernels.setting_of(recipe, model.config) == "apart"
    peft_model = methods.attach(model, Lora(r=4))
    for setting, joined in {"auto": True, "apart": False}.items():
        with kernels.installed(peft_model, setting) as found:
            assert found.joined is joined
    refuse_unsupported(model.config, 32)
    with pytest.raises(
        InputError, match=r"rows over 32 tokens \(longrope\).*data.max_length is 33; set data.packing=false"
    ):
        refuse_unsupported(model.config, 33)


def test_a_training_of_longrope_joins_no_rows_where_one_may_have_other_factors(tiny_model, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_model("phi3"), model)
    config = json.loads((model / "config.json").read_text())
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 127}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config |= {"rope_parameters": rope, "original_max_position_embeddings": 127}
    (model / "config.json").write_text(json.dumps(config))
    for length in (127, 128):
        train(recipe_in(tmp_path, model, {"data": {"max_length": length}, "output_dir": str(tmp_path / str(length))}))
        said = capsys.readouterr().err
        assert ("batches without padding" in said) is (length == 127)
        assert ("rows of this model are not joined" in said) is (length == 128)
    with pytest.raises(InputError, match=r"longrope.*set data.packing=false"):
        train(recipe_in(tmp_path, model, {"data": {"packing": True}}))
