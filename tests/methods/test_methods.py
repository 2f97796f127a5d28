"""Adapters go where they are told, carry what was trained, and refuse a base they were not made for."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import base_model, methods
from qlora.commands.train import train
from qlora.kernels import nf4
from qlora.methods import start
from qlora.recipe import Adalora, Lora, Model, Quantization
from qlora.system.errors import InputError, TrainingFailed
from tests.conftest import CONVERSATIONS, FAMILIES, encode, messages


@pytest.fixture
def saved(load_model, tmp_path):
    """Return save(family, section) -> (PeftModel with random factors, its folder)."""

    def save(family="llama", section=Lora(r=4), quantized=True, token_ids=()):  # noqa: B008 (frozen)
        model = load_model(family) if quantized else load_model(family, None)
        model = methods.attach(model, section, token_ids=token_ids)
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path / f"adapter-{family}"
        methods.save(model, folder, "base/name", "main")
        return model.eval(), folder

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_layer_but_the_head(load_model, family):
    model = load_model(family)
    names = set(base_model.linear_names(model))
    adapted = {
        name.split(".lora_B")[0].removeprefix("base_model.model.")
        for name in methods.first_to_move(methods.attach(model, Lora(r=4)))
    }
    assert adapted == names
    assert not any("lm_head" in name for name in adapted)


def test_named_modules_get_adapters_and_no_others(load_model):
    model = methods.attach(load_model("llama"), Lora(r=4, target_modules=["q_proj", "model.layers.1.mlp.up_proj"]))
    adapted = sorted(
        name.split(".lora_B")[0].removeprefix("base_model.model.") for name in methods.first_to_move(model)
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


def test_trainable_share_is_r_times_in_plus_out(load_model):
    model = methods.attach(load_model("llama"), Lora(r=4))
    expected = sum(4 * (m.in_features + m.out_features) for m in base_model.quantized_modules(model).values())
    assert base_model.num_parameters(model)[0] == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_saving_and_loading_gives_the_same_logits(saved, load_model, family):
    trained, folder = saved(family)
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        loaded = methods.load(load_model(family), folder)(input_ids=ids).logits
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
    config = json.loads((folder / methods.CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("base/name", "main")


def test_qlora_forward_is_lora_on_the_dequantized_weight(saved):
    model, folder = saved("llama", Lora(r=4, lora_alpha=12))
    base_model.to_float32(model)
    read = methods.read(folder)
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
    assert {update.scaling for update in methods.read(folder).updates.values()} == {6.0}


def test_an_adapter_that_did_not_move_stops_the_run(load_model):
    model = methods.attach(load_model("llama"), Lora(r=4))
    before = {name: parameter.detach().clone() for name, parameter in methods.first_to_move(model).items()}
    for index, parameter in enumerate(methods.first_to_move(model).values()):
        if index != 5:
            parameter.data += 1
    with pytest.raises(TrainingFailed, match=rf"1 of 14 adapters did not move.*{list(before)[5]}"):
        methods.refuse_unmoved(model, before)


def test_numbers_that_are_not_finite_never_reach_a_file(load_model, tmp_path):
    model = methods.attach(load_model("llama"), Lora(r=4))
    next(iter(methods.first_to_move(model).values())).data.view(-1)[0] = float("nan")
    with pytest.raises(TrainingFailed, match="non-finite"):
        methods.save(model, tmp_path / "a", "x", None)
    assert not (tmp_path / "a").exists()


def edit_tensors(folder, change):
    tensors = load_file(folder / methods.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / methods.WEIGHTS)


def edit_config(folder, **changes):
    path = folder / methods.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda f: (f / methods.WEIGHTS).unlink(), "adapter_model.safetensors"),
        (lambda f: (f / methods.CONFIG).unlink(), "adapter_config.json"),
        (lambda f: (f / methods.WEIGHTS).write_bytes((f / methods.WEIGHTS).read_bytes()[:-9]), "adapter"),
        (lambda f: edit_tensors(f, lambda t: t.pop(KEY)), "up_proj: has lora_B but not its partner"),
        (lambda f: edit_tensors(f, lambda t: t.update(other=torch.ones(1))), "other: not a tensor of an adapter"),
        (lambda f: edit_tensors(f, lambda t: t[KEY].fill_(float("inf"))), "non-finite"),
        (lambda f: edit_tensors(f, lambda t: t.clear()), "no LoRA tensors"),
        (lambda f: edit_config(f, peft_type="LOHA"), "'LOHA' is not LORA"),
        (lambda f: edit_config(f, use_dora=True), "not its partner lora_magnitude_vector"),
        (lambda f: edit_config(f, layer_replication=[[0, 2]]), "uses layer_replication"),
        (lambda f: edit_config(f, init_lora_weights="pissa"), "changed the base weights"),
        (lambda f: edit_config(f, r=8), "rank differs"),
    ],
)
def test_a_broken_adapter_is_an_input_error(saved, break_it, expected):
    _, folder = saved("llama")
    break_it(folder)
    with pytest.raises(InputError, match=expected):
        methods.read(folder)


def test_an_adapter_of_another_base_is_refused_not_ignored(saved, load_model):
    _, folder = saved("llama")
    with pytest.raises(InputError, match="made for another base"):
        methods.load(load_model("gpt2"), folder)
    edit_tensors(folder, lambda t: t.update({KEY: torch.ones(4, 128, dtype=torch.bfloat16)}))
    with pytest.raises(InputError, match=r"up_proj.lora_A.weight: \(4, 128\), the base needs \(4, 64\)"):
        methods.load(load_model("llama"), folder)


def test_a_copied_folder_reads_the_same(saved, tmp_path):
    _, folder = saved("llama")
    copy = methods.read(shutil.copytree(folder, tmp_path / "copy"))
    assert copy.updates.keys() == methods.read(folder).updates.keys()


# ---- rows of new tokens ----------------------------------------------------------------------------------------------

IDS = [300, 7, 511]
ROWS = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(("family", "num_matrices"), [("llama", 2), ("llama-tied", 1), ("gpt2", 1), ("gemma2", 1)])
def test_rows_are_saved_and_loaded_and_nothing_else_of_the_embeddings(saved, load_model, family, num_matrices):
    trained, folder = saved(family, token_ids=IDS)
    linear = sum(parameter.numel() for name, parameter in trained.named_parameters() if ".lora_" in name)
    assert base_model.num_parameters(trained)[0] == linear + num_matrices * len(IDS) * 64
    others = {key: tensor for key, tensor in load_file(folder / methods.WEIGHTS).items() if ".lora_" not in key}
    assert [tuple(tensor.shape) for tensor in others.values()] == [(3, 64)] * num_matrices

    ids = torch.tensor([[5, *IDS, 9, 300]])
    loaded = methods.load(load_model(family), folder, IDS)
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
            "lm_head.token_adapter.trainable_tokens_delta: contains non-finite values",
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
        methods.read(folder)


def test_rows_that_are_not_finite_never_reach_a_file(load_model, tmp_path):
    model = methods.attach(load_model("llama"), Lora(r=4), token_ids=IDS)
    next(p for n, p in model.named_parameters() if "trainable_tokens" in n).data[1, 1] = float("inf")
    with pytest.raises(TrainingFailed, match="non-finite"):
        methods.save(model, tmp_path / "a", "x", None)


def test_rows_for_another_head_or_of_another_width_are_refused(saved, load_model):
    _, untied = saved("llama", token_ids=IDS)
    with pytest.raises(
        InputError, match=r"\[7, 300, 511\] in lm_head.* need \[7, 300, 511\] in model.embed_tokens; restore"
    ):
        methods.load(load_model("llama-tied"), untied, IDS)
    edit_tensors(untied, lambda t: t.update({ROWS: torch.ones(3, 32, dtype=torch.bfloat16)}))
    with pytest.raises(
        InputError, match=r"lm_head.token_adapter.trainable_tokens_delta: \(3, 32\), the base needs \(3, 64\)"
    ):
        methods.load(load_model("llama"), untied, IDS)
    read = methods.read(untied)
    shapes = {module: update.shape for module, update in read.updates.items()}
    with pytest.raises(InputError, match="lm_head: rows of 32 numbers, the base has 64"):
        read.refuse_mismatch(shapes, {}, {"model.embed_tokens": (512, 64), "lm_head": (512, 64)}, IDS)


# ---- every kind ------------------------------------------------------------------------------------------------------

ADALORA = {"init_r": 6, "target_r": 3, "lora_alpha": 64}
IN_16_BIT = {"quantization": None}

# name -> (family, lora, other sections of the recipe)
KINDS = {
    "dora": ("llama", {"use_dora": True}, {}),
    "dora-conv1d": ("gpt2", {"use_dora": True}, {}),
    "dora-conv1d-16bit": ("gpt2", {"use_dora": True}, IN_16_BIT),
    "dora-biases-rslora": ("qwen2", {"use_dora": True, "use_rslora": True, "bias": "all"}, {}),
    "patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\..*": 2}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True},
        {},
    ),
    "some-layers": (
        "llama", {"target_modules": "all-linear", "layers_to_transform": [1], "exclude_modules": ["o_proj"]}, {},
    ),
    "bias-all": ("gpt2", {"bias": "all"}, {}),
    "bias-all-16bit": ("gpt2", {"bias": "all"}, IN_16_BIT),
    "bias-lora-only": ("qwen2", {"bias": "lora_only"}, {}),
    "bias-of-the-adapter": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}, {}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}, {}),
    "embedding-and-head": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "tied-head": ("llama-tied", {"modules_to_save": ["lm_head"]}, {}),
    "tied-embedding": ("llama-tied", {"modules_to_save": ["embed_tokens"]}, {}),
    "tied-both": ("llama-tied", {"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "tied-as-one-by-the-head": (
        "qwen2", {"modules_to_save": ["lm_head", "model.norm"], "ensure_weight_tying": True}, {},
    ),
    "tied-as-one": ("llama-tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {}),
    "head-with-bias": ("phi", {"modules_to_save": ["lm_head"], "bias": "all"}, {}),
    "wte": ("gpt2", {"modules_to_save": ["wte", "ln_f"]}, {}),
    "norms": ("qwen3", {"modules_to_save": ["input_layernorm", "model.norm"]}, {}),
    "whole-layer-16bit": ("llama", {"modules_to_save": ["model.layers.0.mlp"]}, IN_16_BIT),
    "adalora": ("llama", ADALORA, {}),
    "adalora-conv1d": ("gpt2", ADALORA, {}),
    "adalora-conv1d-16bit": ("gpt2", ADALORA, IN_16_BIT),
    "adalora-more": ("qwen2", {**ADALORA, "bias": "lora_only", "modules_to_save": ["model.norm"]}, {}),
    "adalora-tokens": ("llama", ADALORA, {"model": {"new_tokens": ["<a>", "<b>"]}}),
    "dora-tokens": ("llama", {"use_dora": True}, {"model": {"new_tokens": ["<a>", "<b>"]}}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}, {}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}, {}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}, IN_16_BIT),
    "pissa-conv1d-rslora": (
        "gpt2", {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"c_fc": 2}}, IN_16_BIT,
    ),
    "olora-dora": ("llama", {"init_lora_weights": "olora", "use_dora": True}, IN_16_BIT),
    "loftq": ("llama", {"init_lora_weights": "loftq"}, {}),
    "loftq-conv1d": ("gpt2", {"init_lora_weights": "loftq"}, {}),
    "eva": ("llama", {"init_lora_weights": "eva"}, {}),
    "eva-dora-rslora": ("qwen2", {"init_lora_weights": "eva", "use_dora": True, "use_rslora": True}, {}),
    "eva-conv1d": ("gpt2", {"init_lora_weights": "eva"}, {}),
}  # fmt: skip


@pytest.fixture
def trained(make_recipe):
    """Return run(kind) -> (the model as training left it, recipe, run folder), after two real steps."""

    def run(family, lora, sections):
        left = []
        with pytest.MonkeyPatch.context() as patch:
            original = methods.save
            patch.setattr(methods, "save", lambda model, *rest: left.append(model) or original(model, *rest))
            sections = {"training": {"max_steps": 4 if "init_r" in lora else 2}} | sections
            recipe = make_recipe(family, **{"adalora" if "init_r" in lora else "lora": lora}, **sections)
            done = train(recipe)
        return left[0].eval(), recipe, done

    return run


def base_of(recipe):
    """Return (the base, loaded anew as `recipe` says; the ids of its new tokens)."""
    checkpoint = base_model.find(recipe.model)
    return base_model.load(checkpoint, recipe.model, recipe.quantization), checkpoint.new_tokens.values()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 65).reshape(2, 32) * 7 % 512).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_computes_after_loading_what_was_trained(trained, kind):
    model, recipe, run = trained(*KINDS[kind])
    expected = logits(model)
    base, ids = base_of(recipe)
    before = logits(base)
    loaded = methods.load(base, run.adapter, ids)
    assert torch.equal(logits(loaded), expected)
    assert not torch.allclose(before, expected, atol=0.1)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), before)
    assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} <= {torch.bfloat16, torch.float32}
    assert not loaded.training


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_computes_what_was_trained(trained, kind):
    from peft import PeftModel

    model, recipe, run = trained(*KINDS[kind])
    base, _ = base_of(recipe)
    with warnings.catch_warnings():
        for known in ("Model has `tie_word_embeddings=True`", "The following rank_pattern keys", "fan_in_fan_out"):
            warnings.filterwarnings("ignore", message=known)
        plain = PeftModel.from_pretrained(base, run.adapter)
    # in float32 the two differ by nothing but the order of sums
    torch.testing.assert_close(
        logits(base_model.to_float32(plain)), logits(base_model.to_float32(model)), atol=2e-3, rtol=2e-3
    )


@pytest.mark.parametrize(
    ("kind", "one_matrix"),
    [("tied-head", False), ("tied-embedding", False), ("tied-both", False), ("tied-as-one", True)],
)
def test_what_is_trained_of_a_tied_pair_is_untied_unless_it_is_to_stay_tied(trained, kind, one_matrix):
    model, recipe, run = trained(*KINDS[kind])
    loaded = methods.load(base_of(recipe)[0], run.adapter)
    base = base_of(recipe)[0].lm_head.weight
    for one in (model, loaded):
        embedding, head = one.get_input_embeddings().weight, one.get_output_embeddings().weight
        assert torch.equal(embedding, head) == one_matrix
        assert torch.equal(embedding, base) == (kind == "tied-head")
        assert torch.equal(head, base) == (kind == "tied-embedding")


def test_patterns_set_the_rank_and_scaling_of_the_layers_they_match(load_model):
    section = Lora(r=4, lora_alpha=8, rank_pattern={"q_proj": 6, r"layers\.1\.mlp\..*": 2}, alpha_pattern={"q_proj": 3})
    model = methods.attach(load_model("llama"), section)
    found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers(model).items()}
    for name, expected in found.items():
        rank = 6 if "q_proj" in name else 2 if "layers.1.mlp" in name else 4
        assert expected == (rank, (3 if "q_proj" in name else 8) / rank)
    assert {rank for rank, _ in found.values()} == {2, 4, 6}


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


# ---- starts ----------------------------------------------------------------------------------------------------------


def layers(peft_model):
    return dict(start._layers(peft_model))


def delta(layer):
    """Return scaling * B A, (O, I)."""
    A, B = (getattr(layer, f"lora_{letter}")["default"].weight.detach().float() for letter in "AB")
    return layer.scaling["default"] * B @ A


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (40, 40)])
def test_low_rank_is_the_truncated_svd(shape):
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    A, B = start.low_rank(M, 5)
    U, S, Vh = torch.linalg.svd(M)
    torch.testing.assert_close(B @ A, (U[:, :5] * S[:5]) @ Vh[:5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
    assert start.low_rank(torch.zeros(shape), 5)[0].isfinite().all()


@pytest.mark.parametrize(("family", "shard"), [("llama", "5GB"), ("gpt2", "5GB"), ("llama", "100KB")])
def test_loftq_takes_back_as_much_of_the_quantization_error_as_its_rank_can(tiny_model, family, shard):
    from safetensors.torch import load_file

    section = Model(name_or_path=str(tiny_model(family, shard)))
    checkpoint = base_model.find(section)
    files = set(checkpoint.files.values())
    assert (len(files) > 1) == (shard == "100KB")
    stored = {name: t for file in files for name, t in load_file(checkpoint.folder / file).items()}
    # float32, where A and B are not rounded after the fact
    model = base_model.to_float32(base_model.load(checkpoint, section, Quantization()))
    model = methods.attach(model, Lora(r=6, lora_alpha=20, init_lora_weights="loftq"), checkpoint=checkpoint)
    for name, layer in layers(model).items():
        W = stored.get(f"{name}.weight", stored.get(f"{name.removeprefix('transformer.')}.weight")).float()
        W = W.T if family == "gpt2" else W
        lost = W - nf4.quantize(W.to(torch.bfloat16).contiguous()).rows(0, len(W))
        tail = torch.linalg.svdvals(lost)[6:].norm()
        assert (lost - delta(layer)).norm() == pytest.approx(tail.item(), rel=1e-3), name
        assert tail < 0.95 * lost.norm()


def test_loftq_starts_closer_to_the_16_bit_model_than_nf4(load_model, tiny_model):
    section = Model(name_or_path=str(tiny_model("llama")))
    exact = logits(load_model("llama", None))
    nf4 = logits(load_model("llama"))
    model = methods.attach(
        load_model("llama"), Lora(r=32, init_lora_weights="loftq"), checkpoint=base_model.find(section)
    )
    assert (logits(model.eval()) - exact).norm() < 0.6 * (nf4 - exact).norm()


def test_orthogonal_factors_start_as_nothing_on_4_bit_codes_too(load_model):
    base = logits(load_model("llama"))
    model = methods.attach(load_model("llama"), Lora(r=4, init_lora_weights="orthogonal"))
    for layer in layers(model).values():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert A.norm() > 0.1
        assert B.norm() > 0.1
        assert delta(layer).norm() < 1e-2 * A.norm() * B.norm()
    assert (logits(model.eval()) - base).norm() < 2e-2 * base.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_trains_what_pefts_pissa_trains_and_leaves_the_base_alone(load_model, family, use_rslora):
    from peft import LoraConfig, get_peft_model

    def after_two_steps(model):
        ids = torch.arange(1, 65).reshape(2, 32) * 7 % 512
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            for parameter in trained:  # as training.masters does
                if hasattr(parameter, "held"):
                    parameter.grad[parameter.held] = 0
            optimizer.step()
        return logits(model)

    def fresh():
        return base_model.to_float32(load_model(family, None)).train()

    section = Lora(r=4, lora_alpha=6, init_lora_weights="pissa", use_rslora=use_rslora)
    ours = methods.attach(fresh(), section)
    theirs = get_peft_model(
        fresh(),
        LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", use_rslora=use_rslora, target_modules=list(layers(ours)),
                   fan_in_fan_out=family == "gpt2"),
    )  # fmt: skip
    base = logits(fresh())
    torch.testing.assert_close(logits(ours), base, atol=1e-3, rtol=1e-3)
    found, expected = after_two_steps(ours), after_two_steps(theirs)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found, base, atol=0.1)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), base)


def test_eva_spans_what_the_inputs_vary_in(load_model, tokenizer):
    examples = [encode(tokenizer, messages(turns)) for turns in CONVERSATIONS * 4]
    plain = methods.attach(load_model("llama"), Lora(r=4))
    model = methods.attach(load_model("llama"), Lora(r=4, init_lora_weights="eva"), examples=examples)
    assert torch.equal(logits(model.eval()), logits(load_model("llama")))  # B = 0
    ranks = {name: layer.r["default"] for name, layer in layers(model).items()}
    assert sum(ranks.values()) == 4 * 14
    assert len(set(ranks.values())) > 1
    captured = {}
    for kind, one in (("eva", model), ("random", plain)):
        shares = []
        for layer in layers(one).values():
            inputs = []
            handle = layer.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0].float()))
            with torch.no_grad():
                for example in examples[:24]:
                    one(input_ids=torch.tensor([example.input_ids]))
            handle.remove()
            X = torch.cat([x[0] for x in inputs])
            X = X - X.mean(0)
            Q = torch.linalg.qr(layer.lora_A["default"].weight.float().T).Q
            shares.append(((X @ Q).norm() ** 2 / X.norm() ** 2 / Q.shape[1]).item())
        captured[kind] = sum(shares) / len(shares)
    assert captured["eva"] > 2 * captured["random"]


def test_eva_without_enough_to_read_is_refused(load_model, tokenizer):
    examples = [encode(tokenizer, messages(CONVERSATIONS[0]))]
    with pytest.raises(InputError, match="trained tokens are too few"):
        methods.attach(load_model("llama"), Lora(r=16, init_lora_weights="eva"), examples=examples)


# ---- folders of other tools ------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(load_model, tmp_path):
    """Return make(config, family="llama") -> (PeftModel as PEFT alone makes it, with random numbers; its folder)."""
    from peft import get_peft_model

    def make(config, family="llama"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
            model = get_peft_model(load_model(family), config)
            torch.manual_seed(3)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "magnitude" not in name:
                    torch.nn.init.normal_(parameter, std=0.2)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
            model.save_pretrained(tmp_path / "foreign")
        return model.eval(), tmp_path / "foreign"

    return make


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"], "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "layers_to_transform": [1]},
        {"target_modules": r".*\.1\..*_proj", "use_dora": True},
    ],
)
def test_an_adapter_that_peft_alone_made_loads(foreign, load_model, settings, family):
    from peft import LoraConfig

    made, folder = foreign(LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings), family)
    loaded = methods.load(load_model(family), folder)
    expected, base = logits(made), logits(load_model(family))
    assert torch.equal(logits(loaded), expected)
    assert not torch.allclose(base, expected, atol=0.1)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), base)


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda f: edit_config(f, use_qalora=True), "uses use_qalora, which is not supported"),
        (lambda f: edit_config(f, something_new={"a": 1}), "uses something_new, which is not supported"),
        (lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), "changed the base weights"),
        (lambda f: edit_config(f, init_lora_weights="loftq"), "changed the base weights"),
        (lambda f: edit_config(f, use_dora=False), "lora_magnitude_vector does not belong to this kind"),
        (
            lambda f: edit_tensors(f, lambda t: t.pop(KEY[:-13] + "lora_magnitude_vector")),
            "not its partner lora_magnitude_vector",
        ),
        (lambda f: edit_tensors(f, lambda t: t.pop("base_model.model.lm_head.weight")), "lm_head"),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(9, 64)})),
            r"lm_head.weight: \(9, 64\), the base needs \(512, 64\)",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)})),
            "model.norm.weight: not in the base",
        ),
    ],
)
def test_a_folder_that_does_not_fit_in_every_tensor_is_refused(foreign, load_model, break_it, expected):
    from peft import LoraConfig

    _, folder = foreign(LoraConfig(r=4, target_modules=["up_proj"], modules_to_save=["lm_head"], use_dora=True))
    break_it(folder)
    with pytest.raises(InputError, match=expected):
        methods.load(load_model("llama"), folder)


@pytest.mark.parametrize(
    ("family", "section", "said"),
    [
        ("llama", Lora(r=1_000_000), r"lora\.r: 1000000 is above .* so at most \d+"),
        ("gpt2", Lora(r=100_000), r"lora\.r: 100000"),
        ("llama", Lora(r=4, rank_pattern={"q_proj": 100_000}), r"lora\.rank_pattern 'q_proj': 100000 .*q_proj is"),
        ("llama", Adalora(init_r=100_000), r"adalora\.init_r: 100000"),
    ],
)
def test_a_rank_that_no_layer_can_have_is_refused_before_anything_is_allocated(load_model, family, section, said):
    model = load_model(family)
    with pytest.raises(InputError, match=said):
        methods.attach(model, section)
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_the_smaller_side_of_a_layer_is_the_largest_rank(load_model):
    model = load_model("llama")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    smaller = min(layer.in_features, layer.out_features)
    assert methods.attach(load_model("llama"), Lora(r=smaller, target_modules=["up_proj"]))
    with pytest.raises(InputError, match=f"at most {smaller}"):
        methods.attach(model, Lora(r=smaller + 1, target_modules=["up_proj"]))
