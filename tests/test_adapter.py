"""Adapters go where they are told, carry what was trained, and refuse a base they were not made for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import adapter, base_model
from qlora.errors import InputError, TrainingFailed
from qlora.recipe import Lora
from tests.conftest import FAMILIES


@pytest.fixture
def saved(load_model, tmp_path):
    """Return save(family, section) -> (PeftModel with random factors, its folder)."""

    def save(family="llama", section=Lora(r=4), quantized=True, token_ids=()):  # noqa: B008 (frozen)
        model = load_model(family) if quantized else load_model(family, None)
        model = adapter.attach(model, section, token_ids=token_ids)
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path / f"adapter-{family}"
        adapter.save(model, folder, "base/name", "main")
        return model.eval(), folder

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_layer_but_the_head(load_model, family):
    model = load_model(family)
    names = set(base_model.linear_names(model))
    adapted = {
        name.split(".lora_B")[0].removeprefix("base_model.model.")
        for name in adapter.lora_b(adapter.attach(model, Lora(r=4)))
    }
    assert adapted == names
    assert not any("lm_head" in name for name in adapted)


def test_named_modules_get_adapters_and_no_others(load_model):
    model = adapter.attach(load_model("llama"), Lora(r=4, target_modules=["q_proj", "model.layers.1.mlp.up_proj"]))
    adapted = sorted(name.split(".lora_B")[0].removeprefix("base_model.model.") for name in adapter.lora_b(model))
    assert adapted == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]


@pytest.mark.parametrize("targets", [["q_proj", "qq_proj"], ["lm_head"], ["embed_tokens"], "nothing.*", ["proj"]])
def test_a_name_that_matches_nothing_lists_the_names_that_exist(load_model, targets):
    with pytest.raises(InputError) as caught:
        adapter.attach(load_model("llama"), Lora(r=4, target_modules=targets))
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)
    assert repr(targets if isinstance(targets, str) else targets[-1]) in str(caught.value)


def test_trainable_share_is_r_times_in_plus_out(load_model):
    model = adapter.attach(load_model("llama"), Lora(r=4))
    expected = sum(4 * (m.in_features + m.out_features) for m in base_model.quantized_modules(model).values())
    assert base_model.num_parameters(model)[0] == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_saving_and_loading_gives_the_same_logits(saved, load_model, family):
    trained, folder = saved(family)
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        loaded = adapter.load(load_model(family), folder)(input_ids=ids).logits
        base = load_model(family)(input_ids=ids).logits
    assert torch.equal(loaded, expected)
    assert not torch.allclose(base, expected, atol=0.1)


def test_plain_peft_opens_the_folder(saved, load_model):
    from peft import PeftModel

    trained, folder = saved("llama")
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        found = PeftModel.from_pretrained(load_model("llama"), folder)(input_ids=ids).logits
        base = load_model("llama")(input_ids=ids).logits
    # PEFT upcasts the adapter to float32, so the two differ by bf16 rounding: 20 times less than adapter and base do
    assert (found - expected).norm() < (base - expected).norm() / 20
    config = json.loads((folder / adapter.CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("base/name", "main")


def test_qlora_forward_is_lora_on_the_dequantized_weight(saved):
    model, folder = saved("llama", Lora(r=4, lora_alpha=12))
    base_model.to_float32(model)
    read = adapter.read(folder)
    name = "model.layers.0.mlp.up_proj"
    module = model.get_submodule(f"base_model.model.{name}")
    update = read.updates[name]
    assert update.scaling == 3.0
    A_RI, B_OR = update.A_RI.float(), update.B_OR.float()
    from bitsandbytes.functional import dequantize_4bit

    W_OI = dequantize_4bit(module.base_layer.weight.data, module.base_layer.weight.quant_state)
    x = torch.randn(5, 64)
    torch.testing.assert_close(module(x), x @ (W_OI + 3.0 * B_OR @ A_RI).T, atol=1e-4, rtol=1e-4)


def test_rslora_scales_by_the_root_of_r(saved):
    _, folder = saved("llama", Lora(r=4, lora_alpha=12, use_rslora=True))
    assert {update.scaling for update in adapter.read(folder).updates.values()} == {6.0}


def test_an_adapter_that_did_not_move_stops_the_run(load_model):
    model = adapter.attach(load_model("llama"), Lora(r=4))
    before = {name: parameter.detach().clone() for name, parameter in adapter.lora_b(model).items()}
    for index, parameter in enumerate(adapter.lora_b(model).values()):
        if index != 5:
            parameter.data += 1
    with pytest.raises(TrainingFailed, match=rf"1 of 14 adapters did not move.*{list(before)[5]}"):
        adapter.refuse_unmoved(model, before)


def test_numbers_that_are_not_finite_never_reach_a_file(load_model, tmp_path):
    model = adapter.attach(load_model("llama"), Lora(r=4))
    next(iter(adapter.lora_b(model).values())).data.view(-1)[0] = float("nan")
    with pytest.raises(TrainingFailed, match="not finite"):
        adapter.save(model, tmp_path / "a", "x", None)
    assert not (tmp_path / "a").exists()


def edit_tensors(folder, change):
    tensors = load_file(folder / adapter.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / adapter.WEIGHTS)


def edit_config(folder, **changes):
    path = folder / adapter.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda f: (f / adapter.WEIGHTS).unlink(), "adapter_model.safetensors"),
        (lambda f: (f / adapter.CONFIG).unlink(), "adapter_config.json"),
        (lambda f: (f / adapter.WEIGHTS).write_bytes((f / adapter.WEIGHTS).read_bytes()[:-9]), "adapter"),
        (lambda f: edit_tensors(f, lambda t: t.pop(KEY)), "up_proj: has lora_B but not its partner"),
        (lambda f: edit_tensors(f, lambda t: t.update(other=torch.ones(1))), "other: not a tensor of an adapter"),
        (lambda f: edit_tensors(f, lambda t: t[KEY].fill_(float("inf"))), "not finite"),
        (lambda f: edit_tensors(f, lambda t: t.clear()), "no LoRA tensors"),
        (lambda f: edit_config(f, peft_type="LOHA"), "'LOHA' is not LORA"),
        (lambda f: edit_config(f, use_dora=True), "not its partner lora_magnitude_vector"),
        (lambda f: edit_config(f, layer_replication=[[0, 2]]), "uses layer_replication"),
        (lambda f: edit_config(f, init_lora_weights="pissa"), "trained on a changed base"),
        (lambda f: edit_config(f, r=8), "rank differs"),
    ],
)
def test_a_broken_adapter_is_an_input_error(saved, break_it, expected):
    _, folder = saved("llama")
    break_it(folder)
    with pytest.raises(InputError, match=expected):
        adapter.read(folder)


def test_an_adapter_of_another_base_is_refused_not_ignored(saved, load_model):
    _, folder = saved("llama")
    with pytest.raises(InputError, match="made for another base"):
        adapter.load(load_model("gpt2"), folder)
    edit_tensors(folder, lambda t: t.update({KEY: torch.ones(4, 128, dtype=torch.bfloat16)}))
    with pytest.raises(InputError, match=r"up_proj lora_A: \(4, 128\), the base needs \(4, 64\)"):
        adapter.load(load_model("llama"), folder)


def test_a_copied_folder_reads_the_same(saved, tmp_path):
    _, folder = saved("llama")
    copy = adapter.read(shutil.copytree(folder, tmp_path / "copy"))
    assert copy.updates.keys() == adapter.read(folder).updates.keys()


# ---- rows of new tokens ----------------------------------------------------------------------------------------------

IDS = [300, 7, 511]
ROWS = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(("family", "num_matrices"), [("llama", 2), ("llama-tied", 1), ("gpt2", 1), ("gemma2", 1)])
def test_rows_are_saved_and_loaded_and_nothing_else_of_the_embeddings(saved, load_model, family, num_matrices):
    trained, folder = saved(family, token_ids=IDS)
    linear = sum(parameter.numel() for name, parameter in trained.named_parameters() if ".lora_" in name)
    assert base_model.num_parameters(trained)[0] == linear + num_matrices * len(IDS) * 64
    others = {key: tensor for key, tensor in load_file(folder / adapter.WEIGHTS).items() if ".lora_" not in key}
    assert [tuple(tensor.shape) for tensor in others.values()] == [(3, 64)] * num_matrices

    ids = torch.tensor([[5, *IDS, 9, 300]])
    loaded = adapter.load(load_model(family), folder, IDS)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        expected, found = trained(input_ids=ids).logits, loaded(input_ids=ids).logits
        base = load_model(family)(input_ids=ids).logits
        with loaded.disable_adapter():
            disabled = loaded(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert torch.equal(disabled, base)
    assert not torch.allclose(base, expected, atol=0.1)


def test_plain_peft_opens_a_folder_with_rows(saved, load_model):
    from peft import PeftModel

    trained, folder = saved("llama", token_ids=IDS)
    base_model.to_float32(trained)
    ids = torch.tensor([[5, *IDS, 9, 300]])
    plain = base_model.to_float32(PeftModel.from_pretrained(load_model("llama"), folder))
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, trained(input_ids=ids).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda f: edit_tensors(f, lambda t: t.pop(ROWS)), "lm_head: adapter_config.json names tokens, and their rows"),
        (
            lambda f: edit_tensors(f, lambda t: t[ROWS].fill_(float("nan"))),
            "lm_head.token_adapter.trainable_tokens_delta: holds numbers that are not",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({ROWS: torch.ones(2, 64)})),
            r"lm_head: rows \(2, 64\) do not fit",
        ),
        (lambda f: edit_tensors(f, lambda t: t.update({ROWS: torch.ones(3)})), r"lm_head: rows \(3,\) do not fit"),
        (
            lambda f: edit_config(f, trainable_token_indices=None),
            "rows of tokens that adapter_config.json does not name",
        ),
        (
            lambda f: edit_config(f, trainable_token_indices=1),
            "trainable_token_indices in adapter_config.json is not",
        ),
        (lambda f: edit_config(f, trainable_token_indices={"lm_head": [1, 1, 2]}), "trainable_token_indices"),
        (lambda f: edit_config(f, trainable_token_indices={"lm_head": [1, 2, -1]}), "trainable_token_indices"),
        (lambda f: edit_config(f, trainable_token_indices={"lm_head": "abc"}), "trainable_token_indices"),
    ],
)
def test_broken_rows_are_an_input_error(saved, break_it, expected):
    _, folder = saved("llama", token_ids=IDS)
    break_it(folder)
    with pytest.raises(InputError, match=expected):
        adapter.read(folder)


def test_rows_that_are_not_finite_never_reach_a_file(load_model, tmp_path):
    model = adapter.attach(load_model("llama"), Lora(r=4), token_ids=IDS)
    next(p for n, p in model.named_parameters() if "trainable_tokens" in n).data[1, 1] = float("inf")
    with pytest.raises(TrainingFailed, match="not finite"):
        adapter.save(model, tmp_path / "a", "x", None)


def test_rows_for_another_head_or_of_another_width_are_refused(saved, load_model):
    _, untied = saved("llama", token_ids=IDS)
    with pytest.raises(
        InputError, match=r"\[7, 300, 511\] in lm_head.* ask for \[7, 300, 511\] in model.embed_tokens; give"
    ):
        adapter.load(load_model("llama-tied"), untied, IDS)
    edit_tensors(untied, lambda t: t.update({ROWS: torch.ones(3, 32, dtype=torch.bfloat16)}))
    with pytest.raises(InputError, match=r"lm_head rows: \(3, 32\), the base needs \(3, 64\)"):
        adapter.load(load_model("llama"), untied, IDS)
    read = adapter.read(untied)
    shapes = {module: update.shape for module, update in read.updates.items()}
    with pytest.raises(InputError, match="lm_head: rows of 32 numbers, the base has 64"):
        read.refuse_mismatch(shapes, {}, {"model.embed_tokens": (512, 64), "lm_head": (512, 64)}, IDS)
