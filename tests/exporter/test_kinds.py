"""Every kind of adapter that PEFT makes merges to what PEFT's own merge gives, and loads as a plain model.

The reference is PEFT on an unquantized float32 base, so that only rounding of sums in another order is left.
"""

import math
import warnings

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora import base_model, methods
from qlora.exporter import merge, writer
from qlora.exporter.reader import Reader
from qlora.methods.low_rank import LowRank
from qlora.recipe import Model
from qlora.system.errors import InputError

ALL = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
       "qwen2": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}  # fmt: skip
ALL["llama-tied"] = ALL["llama"]

# name -> (family, config of an adapter)
KINDS = {
    "lora": ("llama", {"r": 4}),
    "lora-gpt2": ("gpt2", {"r": 4, "fan_in_fan_out": True}),
    "rslora": ("llama", {"r": 4, "use_rslora": True}),
    "dora": ("llama", {"r": 4, "use_dora": True}),
    "dora-gpt2": ("gpt2", {"r": 4, "use_dora": True, "fan_in_fan_out": True}),
    "dora-rslora": ("qwen2", {"r": 4, "use_dora": True, "use_rslora": True}),
    "patterns": ("llama", {"r": 4, "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7},
                           "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "up_proj": 5}}),
    "biases": ("qwen2", {"r": 4, "bias": "all"}),
    "biases-of-adapted": ("gpt2", {"r": 4, "bias": "lora_only", "fan_in_fan_out": True}),
    "lora-bias": ("gpt2", {"r": 4, "lora_bias": True, "fan_in_fan_out": True}),
    "head": ("llama", {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "head-tied": ("llama-tied", {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-tied": ("llama-tied", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "saved-head": ("llama", {"r": 4, "modules_to_save": ["lm_head"]}),
    "saved-head-tied": ("llama-tied", {"r": 4, "modules_to_save": ["lm_head"]}),
    "saved-embedding-tied": ("llama-tied", {"r": 4, "modules_to_save": ["embed_tokens"]}),
    "saved-both": ("llama", {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved-both-tied": ("llama-tied", {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved-tied-on-purpose": ("llama-tied", {"r": 4, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "saved-norm": ("llama", {"r": 4, "modules_to_save": ["input_layernorm"]}),
}  # fmt: skip


def plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def shake(model, std=0.1):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    return model


def save(model, folder):
    with warnings.catch_warnings():  # PEFT warns about tied and resized embeddings; what comes of it is tested here
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def export(base_folder, adapter_folder, out):
    """Write the merge on the original base, in float32, as a folder that transformers opens."""
    section = Model(name_or_path=str(base_folder))
    checkpoint = base_model.find(section)
    read = methods.read(adapter_folder)
    plan = merge.plan(checkpoint, base_model.load_config(checkpoint, section), torch.float32, adapter=read)
    merging = merge.Merge(Reader(checkpoint), plan, read, merge.Base({}, None, original=True), torch.device("cpu"))
    out.mkdir()
    writer.write(out, plan.specs, merging.pieces, 10**9)
    plan.config.save_pretrained(out)
    return merging


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 60)[None]).logits


def reload(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about tied weights and embeddings that it saves
@pytest.mark.parametrize("kind", KINDS)
def test_the_merge_is_pefts(tiny_model, tmp_path, kind):
    family, settings = KINDS[kind]
    folder = tiny_model(family)
    config = peft.LoraConfig(**{"target_modules": ALL[family], "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    model = shake(peft.get_peft_model(plain(folder), config)).eval()
    save(model, tmp_path / "adapter")
    live = logits(model)
    merging = export(folder, tmp_path / "adapter", tmp_path / "out")
    found, base = logits(reload(tmp_path / "out")), logits(plain(folder))
    torch.testing.assert_close(found, live, atol=2e-4, rtol=1e-4)
    assert (found - base).abs().max() > 0.1
    assert all(record["delta_norm"] > 0 for record in merging.modules)
    if "tied" not in kind:  # PEFT's own merge of tied weights is wrong
        merged = model.merge_and_unload().state_dict()
        for name, tensor in reload(tmp_path / "out").state_dict().items():
            torch.testing.assert_close(tensor, merged[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
def test_adalora_merges_with_its_pruned_ranks(tiny_model, tmp_path):
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=0, tfinal=1, total_step=4, lora_alpha=8, target_modules=ALL["llama"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = shake(peft.get_peft_model(plain(tiny_model("llama")), config))
    ids = torch.arange(4, 60)[None]
    for step in range(1, 5):
        model(input_ids=ids, labels=ids).loss.backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    save(model.eval(), tmp_path / "adapter")
    ranks = {len(update.A_RI) for update in methods.read(tmp_path / "adapter").updates.values()}
    assert len(ranks) > 1  # some modules have kept more than others
    live = logits(peft.PeftModel.from_pretrained(plain(tiny_model("llama")), tmp_path / "adapter").eval())
    export(tiny_model("llama"), tmp_path / "adapter", tmp_path / "out")
    found = logits(reload(tmp_path / "out"))
    torch.testing.assert_close(found, live, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found, logits(model), atol=2e-4, rtol=1e-4)
    assert (found - logits(plain(tiny_model("llama")))).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_vocabulary_that_another_tool_grew_is_written(tiny_model, tmp_path, family):
    base = plain(tiny_model(family))
    base.resize_token_embeddings(530, mean_resizing=False)
    config = peft.LoraConfig(r=4, target_modules=ALL["llama"], modules_to_save=["embed_tokens", "lm_head"])
    model = shake(peft.get_peft_model(base, config)).eval()
    save(model, tmp_path / "adapter")
    export(tiny_model(family), tmp_path / "adapter", tmp_path / "out")
    exported = reload(tmp_path / "out")
    assert exported.config.vocab_size == 530
    trained = model.get_input_embeddings().weight  # in float32, and not rounded on the way
    assert torch.equal(exported.get_input_embeddings().weight, trained)
    assert not torch.equal(trained, trained.bfloat16().float())
    torch.testing.assert_close(logits(exported), logits(model), atol=2e-4, rtol=1e-4)


# ---- closed forms ----------------------------------------------------------------------------------------------------


def test_lora_by_hand():
    update = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 0.5)
    expected = [[1 + 0.5 * 3, 0 + 0.5 * 6], [0 + 0.5 * 4, 1 + 0.5 * 8]]
    assert update.merged(torch.eye(2)).tolist() == expected
    assert update.merged(torch.eye(2)[1:], slice(1, 2)).tolist() == expected[1:]


def test_dora_by_hand():
    # rows of W + s B A: (3, 4) has norm 5, (0, 2) has norm 2; magnitudes 10 and 1
    update = LowRank(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), 1.0, torch.tensor([10.0, 1.0]))
    base = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert update.merged(base).tolist() == [[6.0, 8.0], [0.0, 1.0]]
    assert update.merged(base[1:], slice(1, 2)).tolist() == [[0.0, 1.0]]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    rank=st.integers(1, 8),
    scaling=st.floats(0.01, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    dora=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rows_merged_apart_are_the_rows_of_the_whole_and_both_are_the_formula(shape, rank, scaling, dtype, dora, seed):
    random = torch.Generator().manual_seed(seed)
    num_out, num_in = shape
    A, B = (torch.randn(*size, generator=random).to(dtype) for size in ((rank, num_in), (num_out, rank)))
    magnitude = torch.rand(num_out, generator=random).to(dtype) if dora else None
    base = torch.randn(num_out, num_in, generator=random)
    update = LowRank(A, B, scaling, magnitude)
    found = update.merged(base)
    expected = base.double() + scaling * B.double() @ A.double()
    if dora:
        expected *= magnitude.double()[:, None] / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.double(), expected, atol=1e-4 * (1 + scaling * rank), rtol=1e-4)
    cut = num_out // 2
    apart = torch.cat([update.merged(base[:cut], slice(0, cut)), update.merged(base[cut:], slice(cut, num_out))])
    torch.testing.assert_close(apart, found, atol=1e-5 * (1 + scaling * rank), rtol=1e-5)


# ---- what cannot be merged -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_everything_that_has_no_place_is_listed_together(tiny_model, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=ALL["llama"], modules_to_save=["lm_head"], lora_bias=True)
    save(peft.get_peft_model(plain(tiny_model("llama")), config), tmp_path / "adapter")
    with pytest.raises(InputError) as caught:
        export(tiny_model("gpt2"), tmp_path / "adapter", tmp_path / "out")
    message = str(caught.value)
    assert "made for another base; it has 28 problems" in message  # 14 layers and 14 biases; the head fits
    assert "model.layers.0.mlp.down_proj: the base has no such layer" in message
    assert "... and 8 more" in message


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_bias_that_the_architecture_cannot_hold_is_refused(tiny_model, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)
    save(peft.get_peft_model(plain(tiny_model("llama")), config), tmp_path / "adapter")
    with pytest.raises(InputError, match="q_proj: lora_bias adds to a bias, and this layer has none"):
        export(tiny_model("llama"), tmp_path / "adapter", tmp_path / "out")


def test_lora_on_weights_tied_on_purpose_is_refused(tiny_model, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    save(peft.get_peft_model(plain(tiny_model("llama-tied")), config), tmp_path / "adapter")
    with pytest.raises(InputError, match="ensure_weight_tying with LoRA on"):
        export(tiny_model("llama-tied"), tmp_path / "adapter", tmp_path / "out")


def test_scaling_is_alpha_over_r_and_over_its_root(tiny_model, tmp_path):
    for rslora, expected in ((False, 8 / 4), (True, 8 / math.sqrt(4))):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=rslora)
        save(peft.get_peft_model(plain(tiny_model("llama")), config), tmp_path / f"{rslora}")
        assert {update.scaling for update in methods.read(tmp_path / f"{rslora}").updates.values()} == {expected}
