"""Export from outside: both bases, any PEFT adapter, mixtures, and nothing half-done whatever is in the way."""

import importlib.util
import json
import os
import re
import shutil

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora import base_model, methods
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.exporter import merge
from qlora.recipe import Lora, Model, Quantization, Recipe
from qlora.system.errors import InputError, ProofFailed
from tests.conftest import CONVERSATIONS, MIXTURES, messages, some_slow, write_jsonl

pytestmark = pytest.mark.usefixtures("unplanned")

OLD_ENOUGH = {"max_steps": 4, "learning_rate": 3e-2}


def weights(folder):
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def run(request, tmp_path_factory, tiny_model):
    """A finished run on the tiny Llama; made once, do not write to it."""
    folder = tmp_path_factory.mktemp("run")
    rows = write_jsonl(folder / "train.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS])
    recipe = {
        "model": {"name_or_path": str(tiny_model("llama"))},
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"train": str(rows), "max_length": 128, "eval_fraction": 0.25},
        "training": {
            **OLD_ENOUGH,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "warmup_ratio": 0,
        },
        "output_dir": str(folder / "run"),
    }
    return train(Recipe.from_dict(recipe))


# ---- which base ------------------------------------------------------------------------------------------------------


def test_the_original_base_is_w_plus_delta_and_says_how_far_that_is_from_what_was_trained(run, tiny_model, tmp_path):
    report = export(run.path, tmp_path / "out", dtype="float32", overrides=["export.base=original"])
    assert (report["base"], report["verified"]) == ("original", True)
    assert report["to_original"]["kl"] < 1e-5  # it is what was asked for ...
    assert report["merged"]["kl"] > 100 * report["to_original"]["kl"]  # ... which is not what was trained
    assert {module["quantization_error"] for module in report["modules"]} == {0.0}
    before, after = weights(tiny_model("llama")), weights(tmp_path / "out")
    for name, update in methods.read(run.adapter).updates.items():
        expected = before[f"{name}.weight"].float() + update.scaling * update.B_OR.float() @ update.A_RI.float()
        torch.testing.assert_close(after[f"{name}.weight"], expected, atol=1e-6, rtol=1e-6)


def test_both_bases_are_compared_as_they_are_and_as_served_in_4_bit(run, tmp_path, capsys):
    report = export(run.path, tmp_path / "out", compare_bases=True)
    found = {row["model"]: row for row in report["comparison"]}
    assert list(found) == [
        "dequantized base, float16",
        "original base, float16",
        "dequantized base, served in nf4",
        "original base, served in nf4",
    ]
    assert found["dequantized base, float16"]["kl"] == report["merged"]["kl"]
    assert found["dequantized base, float16"]["kl"] < 1e-4
    assert min(row["kl"] for name, row in found.items() if name != "dequantized base, float16") > 1e-3
    shown = capsys.readouterr().out
    assert all(name in shown for name in list(found)[1:])
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(name in card for name in list(found)[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the second merge is gone


def test_the_report_says_where_tokenizer_template_and_generation_config_are_from(run, tiny_model, tmp_path, capsys):
    base = tiny_model("llama")
    there = (base / "generation_config.json").is_file()
    of_run = {"tokenizer": "adapter", "chat_template": "adapter", "generation_config": "base" if there else None}
    assert export(run.path, tmp_path / "a", overrides=["export.verify=off"])["origins"] == of_run
    folder = shutil.copytree(run.adapter, tmp_path / "adapter")
    (folder / "manifest.json").unlink()
    own = {"eos_token_id": [2, 5], "temperature": 0.3, "do_sample": True}

    def exported(out):
        found = export(folder, tmp_path / out, model=base, overrides=["export.verify=off"])["origins"]
        assert json.loads((tmp_path / out / "export_report.json").read_text())["origins"] == found
        return found, json.loads((tmp_path / out / "generation_config.json").read_text())

    assert exported("b")[0] == of_run
    (folder / "generation_config.json").write_text(json.dumps(own))
    origins, generation = exported("c")
    assert origins == of_run | {"generation_config": "adapter"}
    assert {name: generation[name] for name in own} == own
    (folder / "chat_template.jinja").unlink()
    assert exported("d")[0] == origins | {"chat_template": "built in"}
    assert "template  ChatML, built in (the model has none)" in capsys.readouterr().err
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert exported("e")[0] == {"tokenizer": "base", "chat_template": "base", "generation_config": "adapter"}
    (folder / "generation_config.json").write_text('{"eos_token_id": "stop"}')
    with pytest.raises(InputError, match=r"adapter.generation_config.json: eos_token_id 'stop' is neither"):
        exported("f")


@pytest.mark.parametrize("start", [True, "pissa"])
def test_an_adapter_that_was_never_trained_is_refused_as_one(load_model, tiny_model, tmp_path, start):
    quantization = None if start == "pissa" else Quantization()
    model = methods.attach(load_model("llama", quantization), Lora(r=4, init_lora_weights=start))
    methods.save(model, tmp_path / "adapter", str(tiny_model("llama")), None)
    with pytest.raises(InputError, match=r"adapter: its update is zero in all 14 layers .* it was never trained"):
        export(tmp_path / "adapter", tmp_path / "out", model=tiny_model("llama"))
    assert not (tmp_path / "out").exists()


def test_the_original_base_is_refused_where_it_would_be_wrong_or_nothing_else(run, make_recipe, tmp_path):
    fitted = train(make_recipe(lora={"init_lora_weights": "loftq"}, output_dir=str(tmp_path / "fitted")))
    with pytest.raises(InputError, match=r"loftq makes the adapter correct .* --base dequantized"):
        export(fitted.path, tmp_path / "out", overrides=["export.base=original"])
    plain = train(Recipe.from_dict({**make_recipe().model_dump(), "quantization": None}))
    for overrides, compare, flag in (
        (["export.base=original"], False, "--base original"),
        ([], True, "--compare-bases"),
    ):
        with pytest.raises(InputError, match=f"was not quantized, so there is only one base; leave {flag} out"):
            export(plain.path, tmp_path / "out", overrides=overrides, compare_bases=compare)
    assert not (tmp_path / "out").exists()


def test_an_adapter_fitted_to_quantization_is_so_without_its_run_and_in_a_sum_too(
    run, make_recipe, tiny_model, tmp_path
):
    fitted = train(make_recipe(lora={"init_lora_weights": "loftq"}))
    for target, model in ((fitted.adapter, tiny_model("llama")), ([f"{run.path}:0.5", f"{fitted.path}:0.5"], None)):
        with pytest.raises(InputError, match="loftq makes the adapter correct"):
            export(target, tmp_path / "out", overrides=["export.base=original"], model=model)


@pytest.mark.parametrize("override", ["quantization=null", "quantization.use_double_quant=false", "lora.lora_alpha=99"])
def test_what_was_trained_cannot_be_overridden(run, tmp_path, override):
    with pytest.raises(InputError, match="was trained with; export uses the run's"):
        export(run.path, tmp_path / "out", overrides=[override])


def test_codes_that_differ_from_the_trainings_are_refused_and_the_same_are_counted(run, tmp_path):
    assert export(run.path, tmp_path / "out")["quantized"] == {"modules": 14, "same_codes_as_training": 14}
    other = shutil.copytree(run.path, tmp_path / "other")
    environment = json.loads((other / "environment.json").read_text())
    name = "model.layers.1.mlp.up_proj"
    environment["base_model"]["quantized_sha256"][name] = "0" * 64
    (other / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(
        InputError,
        match=rf"differ from those used in training in 1 layer; the run has 1 problem\n  {name}: different 4-bit",
    ):
        export(other, tmp_path / "out2")
    assert not list(tmp_path.glob("out2*"))


# ---- adapters of other tools -----------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tiny_model, tmp_path):
    """Return make(family, **config) -> an adapter folder as plain PEFT writes it, trained on the 4-bit base."""

    def make(family="llama", **config):
        section = Model(name_or_path=str(tiny_model(family)))
        model = base_model.load(base_model.find(section), section, Recipe.model_fields["quantization"].default)
        config = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **config}
        model = peft.get_peft_model(model, peft.LoraConfig(**config))
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / "foreign")
        return tmp_path / "foreign"

    return make


def test_an_adapter_of_another_tool_exports_proven_on_the_base_that_is_named(foreign, tiny_model, tmp_path, capsys):
    folder = foreign()
    report = export(folder, tmp_path / "out", model=tiny_model("llama"))
    assert report["verified"]
    assert report["rows"]["from"] == "built-in sentences"
    assert len(report["modules"]) == 4
    assert report["base_model"]["kl"] > 100 * report["merged"]["kl"]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS[:5]])
    report = export(folder, tmp_path / "out2", model=tiny_model("llama"), data=rows)
    assert report["rows"]["count"] == 5
    assert report["rows"]["from"] == "rows of rows.jsonl"


def test_what_an_adapter_was_trained_on_is_assumed_until_somebody_says_it(foreign, run, tiny_model, tmp_path, capsys):
    """A proof against a guess is no proof: the row, the verdict, the report and the card say so."""
    folder = foreign()
    guessed = export(folder, tmp_path / "guessed", model=tiny_model("llama"))
    said = capsys.readouterr()
    assert (guessed["verified"], guessed["live_model"]) == (True, "assumed")
    assert "assumed to be quantized to nf4" in said.err
    assert "assumed (quantized + adapter, live)" in said.out
    assert "matches the assumed model" in said.err
    assert "proven;" not in said.err
    assert "Unknown: the adapter does not record how" in (tmp_path / "guessed" / "README.md").read_text()
    known = export(folder, tmp_path / "known", overrides=["quantization.quant_type=nf4"], model=tiny_model("llama"))
    assert known["live_model"] == "declared"
    assert "proven;" in capsys.readouterr().err
    assert export(run.path, tmp_path / "own")["live_model"] == "recorded"


def test_half_a_tokenizer_is_not_replaced_by_the_bases(foreign, tiny_model, tmp_path):
    folder = foreign()
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(InputError, match=r"has tokenizer\.model but no tokenizer\.json, and the base's"):
        export(folder, tmp_path / "out", model=tiny_model("llama"))


def test_a_tokenizer_with_more_ids_than_rows_is_refused(foreign, tiny_model, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("llama"))
    num_rows = json.loads((tiny_model("llama") / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<spare {number}>" for number in range(len(tokenizer), num_rows)])  # rows that are there
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    folder = foreign()
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        InputError, match=rf"1 tokens of its tokenizer have no row in the embedding, .*'\[PAD\]' has id {num_rows:,}"
    ):
        export(folder, tmp_path / "out", model=tiny_model("llama"))


def test_an_adapter_needs_a_base_and_a_run_has_one(foreign, run, tiny_model, tmp_path):
    with pytest.raises(InputError, match=r"is an adapter; name the model it was trained on: --model .*llama"):
        export(foreign(), tmp_path / "out")
    with pytest.raises(InputError, match="is a run, which records its base"):
        export(run.path, tmp_path / "out", model=tiny_model("llama"))
    with pytest.raises(InputError, match="no run at"):
        export(tmp_path / "nothing", tmp_path / "out", model=tiny_model("llama"))
    with pytest.raises(InputError, match="made for another base"):
        export(tmp_path / "foreign", tmp_path / "out", model=tiny_model("gpt2"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about embeddings that it saves
def test_a_vocabulary_that_another_tool_grew_is_exported_proven(tiny_model, tmp_path):
    section = Model(name_or_path=str(tiny_model("llama")))
    model = base_model.load(base_model.find(section), section, Recipe.model_fields["quantization"].default)
    model.resize_token_embeddings(530, mean_resizing=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "grown")
    report = export(tmp_path / "grown", tmp_path / "out", model=tiny_model("llama"))
    assert (report["verified"], report["verify"]) == (True, "full")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 530
    with pytest.raises(InputError, match=r"enlarged vocabulary.* --verify full"):
        export(tmp_path / "grown", tmp_path / "out2", overrides=["export.verify=layers"], model=tiny_model("llama"))


# ---- how much is proven, and in how much memory ----------------------------------------------------------------------


@pytest.mark.parametrize(("free", "expected"), [(2**40, "full"), (2**20, "layers")])
def test_the_proof_is_whole_where_that_fits_and_says_its_bound_ahead(
    run, tmp_path, monkeypatch, capsys, free, expected
):
    monkeypatch.setattr("qlora.system.memory.available_bytes", lambda device: free)
    report = export(run.path, tmp_path / "out")
    assert (report["verify"], report["verified"]) == (expected, True)
    said = capsys.readouterr().err
    assert said.index(f"proof     {expected}:") < said.index("wrote ")


def test_both_ways_of_proving_give_the_same_numbers(run, tmp_path):
    full, layers = (
        export(run.path, tmp_path / how, overrides=[f"export.verify={how}"], compare_bases=True)
        for how in ("full", "layers")
    )
    for key in ("loss", "kl"):
        assert layers["merged"][key] == pytest.approx(full["merged"][key], rel=0.05, abs=1e-7)
        for one, other in zip(layers["comparison"], full["comparison"], strict=True):
            assert one[key] == pytest.approx(other[key], rel=0.01, abs=1e-6)


# ---- mixtures of experts ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # PEFT's own, for experts
@pytest.mark.parametrize("family", some_slow(MIXTURES, but=["mixtral"]))
def test_a_mixture_exports_with_its_experts_as_the_files_have_them(make_recipe, tiny_model, tmp_path, family):
    recipe = make_recipe(family, training=OLD_ENOUGH)
    report = export(train(recipe).path, tmp_path / "out", dtype="bfloat16")
    assert report["verified"]
    before, after = weights(tiny_model(family)), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert all(torch.equal(before[name], after[name]) for name in experts)
    with pytest.raises(InputError, match="--verify full"):
        export(tmp_path / "run", tmp_path / "out2", overrides=["export.verify=layers"])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        ("gpt-oss", {}),
        # PEFT refuses out_proj; the state-space block reads the weight of dt_proj without calling it
        ("mamba", {"lora": {"exclude_modules": ["out_proj", "dt_proj"]}, "quantization": None}),
    ],
)
@pytest.mark.slow
def test_parameters_that_are_no_layers_weight_go_over_as_they_are(make_recipe, tiny_model, tmp_path, family, sections):
    run = train(make_recipe(family, training=OLD_ENOUGH, **sections))
    assert export(run.path, tmp_path / "out", dtype="float32")["verified"]
    before, after = weights(tiny_model(family)), weights(tmp_path / "out")
    loose = [name for name in before if before[name].dim() == 2 and not name.endswith("weight")]
    assert len(loose) == {"gpt-oss": 4, "mamba": 2}[family]
    assert all(torch.equal(before[name].float(), after[name]) for name in loose)


def test_layers_that_peft_refuses_are_named_before_training(make_recipe):
    with pytest.raises(InputError, match=r"PEFT refuses MambaForCausalLM: .*out_proj.*(?s:.*)lora.exclude_modules"):
        train(make_recipe("mamba", quantization=None))


def test_files_of_a_dtype_that_is_not_read_end_before_training(make_recipe, tiny_model, tmp_path):
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.input_layernorm.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"{name} is F8_E4M3"):
        train(make_recipe(model={"name_or_path": str(base)}))
    assert not (tmp_path / "run").exists()


# ---- what is written -------------------------------------------------------------------------------------------------


def test_the_index_gives_bytes_and_every_tensor_its_file(run, tmp_path):
    report = export(run.path, tmp_path / "out", overrides=["export.max_shard_size=100KB"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"]["total_size"]
        == report["bytes"]
        == sum(tensor.numel() * tensor.element_size() for tensor in weights(tmp_path / "out").values())
    )
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118


def test_without_a_proof_the_report_and_the_card_say_not_verified(run, tmp_path, capsys):
    report = export(run.path, tmp_path / "out", overrides=["export.verify=off"])
    assert (report["verify"], report["verified"]) == ("off", False)
    assert "merged" not in report
    assert "NOT VERIFIED" in capsys.readouterr().err
    assert "**Not verified**" in (tmp_path / "out" / "README.md").read_text()
    assert weights(tmp_path / "out").keys() == weights(export_of(run, tmp_path / "proven")).keys()


def export_of(run, out):
    export(run.path, out)
    return out


def test_the_card_tells_no_path_of_this_machine(run, tiny_model, tmp_path):
    export(run.path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert str(tiny_model("llama").parent) not in card
    assert "dequantize(NF4(W)) + s B A" in card
    assert "Yes, measured" in card


@pytest.mark.slow
def test_what_storing_costs_is_told_and_is_less_in_more_bits(run, tmp_path, capsys):
    losses = {}
    for dtype in ("bfloat16", "float16", "float32"):
        losses[dtype] = export(run.path, tmp_path / dtype, dtype=dtype)["cast"]["loss"]
    assert losses["bfloat16"] > 6 * losses["float16"] > 1000 * losses["float32"]
    light = shutil.copytree(run.path, tmp_path / "light")
    tensors = load_file(light / "adapter" / methods.WEIGHTS)
    save_file(
        {key: value * (0.02 if "lora_B" in key else 1) for key, value in tensors.items()},
        light / "adapter" / methods.WEIGHTS,
    )
    (light / "adapter" / methods.MANIFEST).unlink()  # changed on purpose
    capsys.readouterr()
    report = export(light, tmp_path / "lossy", overrides=["export.dtype=bfloat16", "export.verify=off"])
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert report["cast"]["loss"] > report["cast"]["limit"]
    assert f"storing in bfloat16 loses {report['cast']['loss']:.0%} of what training changed" in said
    assert "--dtype float16 keeps 8 times as much" in said


@pytest.mark.slow
def test_numbers_that_float16_makes_zero_are_counted(run, tiny_model, tmp_path, capsys):
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][:3] = 1e-9
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    own = shutil.copytree(run.adapter, tmp_path / "adapter", ignore=shutil.ignore_patterns(methods.MANIFEST))
    report = export(own, tmp_path / "out", model=base)
    assert report["cast"]["underflows"]["model.norm.weight"] == 3
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert re.search(r"values underflow to 0 in float16, the most in \S+ \(\d+\)", said)


# ---- never half a model ----------------------------------------------------------------------------------------------


def test_an_out_that_is_or_leads_to_an_input_is_refused_and_left_alone(run, tiny_model, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tiny_model("llama"), target_is_directory=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    to_empty = tmp_path / "to-empty"
    to_empty.symlink_to(empty, target_is_directory=True)
    before = sorted(path.name for path in tiny_model("llama").iterdir())
    for out in (run.path, run.adapter, tiny_model("llama"), link, to_empty, run.path / "recipe.yaml"):
        with pytest.raises(InputError, match=r"not empty|is a symbolic link|is a file"):
            export(run.path, out)
    assert sorted(path.name for path in tiny_model("llama").iterdir()) == before
    several = shutil.copytree(run.path.parent, tmp_path / "sum.partial")
    with pytest.raises(InputError, match="choose another folder"):
        export([f"{several / 'run'}:0.5", f"{run.path}:0.5"], tmp_path / "sum")
    assert (several / "run" / "recipe.yaml").is_file()
    # the place where the export is made must not be an input either: it would be removed as a leftover
    base = shutil.copytree(tiny_model("llama"), tmp_path / "model.partial")
    with pytest.raises(InputError, match="choose another folder"):
        export(run.adapter, tmp_path / "model", model=base)
    assert sorted(path.name for path in base.iterdir()) == before


def test_a_leftover_of_a_killed_export_is_replaced(run, tmp_path):
    leftover = tmp_path / "out.partial"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    export(run.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_counts_as_free(run, tmp_path, monkeypatch):
    for name in ("out.partial", "out.partial.scratch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(40 * 2**20))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    assert export(run.path, tmp_path / "out")["verified"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_disk_is_known_before_anything_is_written_with_both_numbers(run, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5 * 2**20}))
    with pytest.raises(InputError, match=r"the model needs 64 MiB, and 5 MiB are free on that disk"):
        export(run.path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_modes_follow_the_umask(run, tmp_path):
    before = os.umask(0o077)
    try:
        export(run.path, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o600}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_an_export_that_is_not_what_was_asked_for_leaves_nothing(run, tmp_path, monkeypatch):
    original = merge._cast

    def wrong(spec, stored, base, merged):
        return original(spec, stored, base, merged * 1.2 if "layers.1.mlp.up_proj" in spec.name else merged)

    monkeypatch.setattr(merge, "_cast", wrong)
    for base in ("dequantized", "original"):
        with pytest.raises(ProofFailed, match="the export differs from the"):
            export(run.path, tmp_path / "out", overrides=[f"export.base={base}"])
        assert not list(tmp_path.iterdir())


def test_plain_transformers_answers_as_the_card_says(run, tmp_path):
    export(run.path, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    ids = tokenizer.apply_chat_template(messages(CONVERSATIONS[0])[:1], add_generation_prompt=True, return_tensors="pt")
    answer = model.float().generate(**ids, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > ids["input_ids"].shape[1]


# ---- further targets -------------------------------------------------------------------------------------------------


def test_a_gguf_file_and_a_modelfile_lie_in_the_folder_and_the_report_says_what_is_proven(run, tmp_path, capsys):
    report = export(run.path, tmp_path / "out", gguf="q8_0")
    found = report["gguf"]
    assert (tmp_path / "out" / "out-q8_0.gguf").stat().st_size == found["bytes"]
    assert found["proven"] == (importlib.util.find_spec("llama_cpp") is not None)
    assert found["proven"] or "llama-cpp-python" in found["why_not"]
    said = capsys.readouterr().err
    assert ("not proven" in said) != found["proven"]
    assert "FROM ./out-q8_0.gguf" in (tmp_path / "out" / "Modelfile").read_text()


@pytest.mark.slow
def test_what_no_gguf_file_can_hold_is_refused_before_anything_is_written(run, make_recipe, tmp_path):
    with pytest.raises(InputError, match="--gguf q5: give one of f16, q8_0, q4_k_m"):
        export(run.path, tmp_path / "out", gguf="q5")
    mixture = train(make_recipe("mixtral", lora={"target_modules": ["q_proj"]}))
    with pytest.raises(InputError, match="mixtral"):
        export(mixture.path, tmp_path / "out", gguf="f16")
    assert not list(tmp_path.glob("out*"))
