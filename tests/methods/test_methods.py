"""What was trained is what is saved, loaded and exported, for every kind of adapter and every start."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora import base_model, methods
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.kernels import nf4
from qlora.methods import initial_weights
from qlora.recipe import Lora, Model, Quantization
from qlora.system.errors import InputError, TrainingFailed
from tests.conftest import AUTO, CONVERSATIONS, encode, messages, some_slow
from tests.methods.folders import IDS


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


def test_an_adapter_that_did_not_move_stops_the_run(load_model):
    model = methods.attach(load_model("llama"), Lora(r=4))
    before = {name: parameter.detach().clone() for name, parameter in methods.trainable(model).first_to_move.items()}
    for index, parameter in enumerate(methods.trainable(model).first_to_move.values()):
        if index != 5:
            parameter.data += 1
    with pytest.raises(TrainingFailed, match=rf"1 of 14 adapters did not move.*{list(before)[5]}"):
        methods.refuse_unmoved(methods.trainable(model).first_to_move, before)


def test_numbers_that_are_not_finite_never_reach_a_file(load_model, tmp_path):
    model = methods.attach(load_model("llama"), Lora(r=4))
    next(iter(methods.trainable(model).first_to_move.values())).data.view(-1)[0] = float("nan")
    with pytest.raises(TrainingFailed, match="non-finite"):
        methods.save(model, tmp_path / "a", "x", None)
    assert not (tmp_path / "a").exists()


# ---- rows of new tokens ----------------------------------------------------------------------------------------------


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


def test_rows_that_are_not_finite_never_reach_a_file(load_model, tmp_path):
    model = methods.attach(load_model("llama"), Lora(r=4), token_ids=IDS)
    next(p for n, p in model.named_parameters() if "trainable_tokens" in n).data[1, 1] = float("inf")
    with pytest.raises(TrainingFailed, match="non-finite"):
        methods.save(model, tmp_path / "a", "x", None)


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
    "corda": ("qwen2", {"init_lora_weights": "corda"}, {}),
    "lora-ga-rslora": ("llama", {"init_lora_weights": "lora_ga", "use_rslora": True}, {}),
}  # fmt: skip


@pytest.fixture
def trained(make_recipe, unplanned):
    """Return run(kind) -> (the model as training left it, recipe, run folder), after a few real steps."""

    def run(family, lora, sections):
        left = []
        with pytest.MonkeyPatch.context() as patch:
            original = methods.save
            patch.setattr(methods, "save", lambda model, *rest: left.append(model) or original(model, *rest))
            sections = {"training": {"max_steps": 4 if "init_r" in lora else 3}} | sections
            recipe = make_recipe(family, **{"adalora" if "init_r" in lora else "lora": lora}, **sections)
            done = train(recipe)
        return left[0].eval(), done.recipe(), done

    return run


def base_of(recipe):
    """Return (the base, loaded anew as `recipe` says; the ids of its new tokens)."""
    checkpoint = base_model.find(recipe.model)
    return base_model.load(checkpoint, recipe.model, recipe.quantization), checkpoint.new_tokens.values()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 65).reshape(2, 32) * 7 % 512).logits.float()


# which of them are proven layer by layer, the others with the whole model
LAYERS = ["dora", "dora-conv1d", "bias-all", "tied-head", "tied-as-one", "adalora", "dora-tokens", "loftq", "norms"]


IN_CI = ("dora", "tied-head", "adalora", "loftq")


@pytest.mark.parametrize("kind", some_slow(KINDS, but=IN_CI))
def test_every_kind_computes_after_loading_and_exporting_what_was_trained(trained, tmp_path, kind):
    model, recipe, run = trained(*KINDS[kind])
    expected = logits(model)
    base, ids = base_of(recipe)
    before = logits(base)
    loaded = methods.load(base, run.adapter, ids)
    # saved without the ranks that were cut: fewer terms in its sums
    rounding = 1e-5 if kind == "adalora" and AUTO == "float32" else 0
    torch.testing.assert_close(logits(loaded), expected, atol=rounding, rtol=0)
    assert not torch.allclose(before, expected, atol=0.1)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), before)
    torch.testing.assert_close(logits(loaded), expected, atol=rounding, rtol=0)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} <= {torch.bfloat16, torch.float32}
    assert not loaded.training
    if kind in TIED:
        for one in (model, loaded):
            assert_untied_unless_it_is_to_stay_tied(one, recipe, kind)
    assert_exports_proven(run, kind, tmp_path / "out")
    assert_plain_peft_computes_what_was_trained(model, recipe, run)


def assert_plain_peft_computes_what_was_trained(model, recipe, run):
    from peft import PeftModel

    base, _ = base_of(recipe)
    with warnings.catch_warnings():
        for known in ("Model has `tie_word_embeddings=True`", "The following rank_pattern keys", "fan_in_fan_out"):
            warnings.filterwarnings("ignore", message=known)
        plain = PeftModel.from_pretrained(base, run.adapter)
    # in float32 the two differ by nothing but the order of sums
    torch.testing.assert_close(
        logits(base_model.to_float32(plain)), logits(base_model.to_float32(model)), atol=2e-3, rtol=2e-3
    )


# is what is trained of a tied pair one matrix?
TIED = {"tied-head": False, "tied-embedding": False, "tied-both": False, "tied-as-one": True}


def assert_untied_unless_it_is_to_stay_tied(model, recipe, kind):
    base = base_of(recipe)[0].lm_head.weight
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(embedding, head) == TIED[kind]
    assert torch.equal(embedding, base) == (kind == "tied-head")
    assert torch.equal(head, base) == (kind == "tied-embedding")


def assert_exports_proven(run, kind, out):
    verify = "layers" if kind in LAYERS else "full"
    report = export(run.path, out, "float32", [f"export.verify={verify}"])
    assert (report["verify"], report["verified"]) == (verify, True)
    assert report["merged"]["kl"] < 1e-6
    assert report["base_model"]["kl"] > 30 * report["merged"]["kl"]
    tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    base = json.loads((run.recipe().model.name_or_path / Path("config.json")).read_text())
    assert tied == (
        base.get("tie_word_embeddings", True) and kind not in ("tied-head", "tied-embedding", "tied-both", "wte")
    )


# ---- starts ----------------------------------------------------------------------------------------------------------


def layers(peft_model):
    return dict(initial_weights._layers(peft_model))


def delta(layer):
    """Return scaling * B A, (O, I)."""
    A, B = (getattr(layer, f"lora_{letter}")["default"].weight.detach().float() for letter in "AB")
    return layer.scaling["default"] * B @ A


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (40, 40)])
def test_low_rank_is_the_truncated_svd(shape):
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    A, B = initial_weights.low_rank(M, 5)
    U, S, Vh = torch.linalg.svd(M)
    torch.testing.assert_close(B @ A, (U[:, :5] * S[:5]) @ Vh[:5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
    assert initial_weights.low_rank(torch.zeros(shape), 5)[0].isfinite().all()


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

    def after_two_steps(model, held):
        ids = torch.arange(1, 65).reshape(2, 32) * 7 % 512
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            for name, index in held.items():  # as MasterWeights does
                model.get_parameter(name).grad[index] = 0
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
    found, expected = after_two_steps(ours, methods.trainable(ours).held), after_two_steps(theirs, {})
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
        inputs = {name: [] for name in layers(one)}
        for name, layer in layers(one).items():
            layer.register_forward_pre_hook(lambda module, args, seen=inputs[name]: seen.append(args[0][0].float()))
        with torch.no_grad():
            for example in examples[:24]:
                one(input_ids=torch.tensor([example.input_ids]))
        shares = []
        for name, layer in layers(one).items():
            X = torch.cat(inputs[name])
            X = X - X.mean(0)
            Q = torch.linalg.qr(layer.lora_A["default"].weight.float().T).Q
            shares.append(((X @ Q).norm() ** 2 / X.norm() ** 2 / Q.shape[1]).item())
        captured[kind] = sum(shares) / len(shares)
    assert captured["eva"] > 2 * captured["random"]


def test_eva_without_enough_to_read_is_refused(load_model, tokenizer):
    examples = [encode(tokenizer, messages(CONVERSATIONS[0]))]
    with pytest.raises(InputError, match="trained tokens are too few"):
        methods.attach(load_model("llama"), Lora(r=16, init_lora_weights="eva"), examples=examples)
