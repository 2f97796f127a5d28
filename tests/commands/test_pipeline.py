"""The whole way on every family: recipe -> run folder -> proven model folder, opened by plain transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from qlora import base_model, methods
from qlora.commands.chat import chat
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.plan import plan
from qlora.commands.train import train
from qlora.evaluation import generate
from qlora.exporter import merge
from qlora.jobs.opening.opened_model import open_subject
from qlora.methods import low_rank
from qlora.recipe import Recipe
from qlora.runs.folder import RunDir
from qlora.system.errors import DoesNotFit, InputError, ProofFailed
from qlora.system.units import size
from tests.conftest import AUTO, CHATML, CONVERSATIONS, FAMILIES, SHAPE, messages, some_slow, write_jsonl


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


@pytest.mark.parametrize("family", some_slow(FAMILIES, but=("llama",)))
def test_exported_is_trained_and_not_base(trained_once, tmp_path, family):
    run = trained_once(family)
    recipe = run.recipe()
    report = export(run.path, tmp_path / "out")

    # by the report ...
    assert report["verified"]
    assert report["merged"]["kl"] < 1e-4
    assert report["base_model"]["kl"] > 10 * report["merged"]["kl"]
    # ... and apart from it: plain transformers on one side, the live NF4 + adapter model on the other
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    checkpoint = base_model.find(recipe.model)
    live = methods.load(base_model.load(checkpoint, recipe.model, recipe.quantization), run.adapter)
    base_model.to_float32(live)
    ids = torch.arange(4, 60)[None]
    difference = (logits(exported, ids) - logits(live, ids)).abs().max()
    with live.disable_adapter():
        from_base = (logits(exported, ids) - logits(live, ids)).abs().max()
    assert difference < 0.05
    assert from_base > 5 * difference


@pytest.mark.parametrize("system_as_user", some_slow([False, True], but=[True]))
def test_a_tokenizer_with_several_templates_goes_the_whole_way(
    make_recipe, tiny_model, tokenizer, tmp_path, unplanned, system_as_user
):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools[0]['function']['name'] }} " + CHATML}
    tokenizer.save_pretrained(folder)
    rows = [{"messages": messages(turns), "tools": [{"name": "add"}]} for turns in CONVERSATIONS]
    recipe = make_recipe(
        model={"name_or_path": str(folder)},
        data={"train": str(write_jsonl(tmp_path / "calls.jsonl", rows)), "system_as_user": system_as_user},
    )
    run = train(recipe)
    assert export(run.path, tmp_path / "out")["verified"]
    templates = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert templates.keys() == {"default", "tool_use"}
    before = "{%- if messages" if system_as_user else ""
    assert all(found.startswith(before) and found.endswith(CHATML) for found in templates.values())
    said = [("system", "Be short.")] * system_as_user + [("user", "What is 1 plus 2?")]
    prompt = tokenizer.apply_chat_template(
        messages(said), chat_template=templates["default"], add_generation_prompt=True, return_dict=False
    )
    loaded = open_subject(run.path)
    [answer] = generate.answers(loaded.model, loaded.tokenizer, [prompt], loaded.stops, 4)
    system = "Be short." if system_as_user else None
    assert chat(run.path, "What is 1 plus 2?", system, max_new_tokens=4).strip() == answer.strip()
    more = "adapter/additional_chat_templates/tool_use.jinja"
    (run.path / more).write_text("another")
    with pytest.raises(InputError, match=r"additional_chat_templates/tool_use\.jinja changed since the training"):
        chat(run.path, "What is 1 plus 2?")


def test_a_base_whose_pad_token_has_no_row_in_the_embedding_goes_the_whole_way(
    make_recipe, tokenizer, tmp_path, unplanned
):
    config = transformers.LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer)}, tie_word_embeddings=False)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == config.vocab_size
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": "What is this? " * (1 + n % 3), "completion": "a b c"} for n in range(24)]  # padded
    recipe = make_recipe(
        kernels="off",
        model={"name_or_path": str(tmp_path / "base")},
        data={"train": str(write_jsonl(tmp_path / "rows.jsonl", rows))},
    )
    run = train(recipe)
    assert evaluate(run.path, max_rows=4)["rows"] == 4
    assert export(run.path, tmp_path / "out")["verified"]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["pad_token_id"] == tokenizer.eos_token_id


def test_the_folder_is_an_ordinary_model(trained_once, tmp_path):
    run = trained_once("llama-tied")
    export(run.path, tmp_path / "out", dtype="bfloat16")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                     "chat_template.jinja", "export_report.json", "README.md"}  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2  # as the base's file has it
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # by the umask, weights too
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    trained = transformers.AutoTokenizer.from_pretrained(run.adapter)
    conversation = messages(CONVERSATIONS[0])
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == trained.apply_chat_template(
        conversation, tokenize=False
    )


def test_a_sharded_export_loads_and_is_the_same(trained_once, tmp_path):
    run = trained_once()
    export(run.path, tmp_path / "one")
    export(run.path, tmp_path / "many", overrides=["export.max_shard_size=100KB"])
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many")
    )
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.usefixtures("unplanned")
def test_without_quantization_the_same_code_trains_and_exports(make_recipe, tmp_path):
    recipe = Recipe.from_dict({**make_recipe("gpt2").model_dump(), "quantization": None})
    run = train(recipe)
    assert run.environment()["base_model"]["quantized_modules"] == []
    report = export(run.path, tmp_path / "out")
    assert report["verified"]
    assert {module["quantization_error"] for module in report["modules"]} == {0.0}


@pytest.mark.slow
@pytest.mark.usefixtures("unplanned")
def test_rslora_and_named_modules_export_proven(make_recipe, tmp_path):
    run = train(make_recipe(lora={"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}))
    report = export(run.path, tmp_path / "out")
    assert report["verified"]
    assert len(report["modules"]) == 4


def test_a_wrong_merge_leaves_nothing_and_is_a_failed_proof(trained_once, tmp_path, monkeypatch):
    run = trained_once()
    monkeypatch.setattr(low_rank.LowRank, "merged", lambda self, base, rows=None: base)  # the adapter is lost
    with pytest.raises(ProofFailed, match="differs from the trained model"):
        export(run.path, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_merge_killed_halfway_leaves_nothing_that_looks_whole_and_a_rerun_succeeds(
    trained_once, tmp_path, monkeypatch
):
    run = trained_once()
    original = merge.Merge.pieces

    def interrupted(self, name):
        if "layers.1" in name:
            raise KeyboardInterrupt
        return original(self, name)

    monkeypatch.setattr(merge.Merge, "pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert export(run.path, tmp_path / "out")["verified"]


def test_export_needs_no_data_file(make_recipe, tmp_path):
    recipe = make_recipe()
    run = train(recipe)
    (tmp_path / "train.jsonl").unlink()
    report = export(run.path, tmp_path / "out")
    assert report["rows"] == {"count": 6, "from": "held-out rows", "positions": report["rows"]["positions"]}
    with pytest.raises(InputError, match="no data file"):
        evaluate(run.path)


def test_export_refuses_a_folder_in_use_and_a_full_disk(trained_once, tmp_path, monkeypatch):
    run = trained_once()
    with pytest.raises(InputError, match="not empty"):
        export(run.path, run.path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="1000 B are free"):
        export(run.path, tmp_path / "out")


def test_a_changed_base_is_refused_by_every_verb(trained_once, tmp_path, tiny_model):
    run = trained_once()
    other = [f"model.name_or_path={tiny_model('mistral')}"]
    for verb in (lambda: export(run.path, tmp_path / "out", overrides=other), lambda: evaluate(run.path, overrides=other),
                 lambda: chat(run.path, "hi", overrides=other)):  # fmt: skip
        with pytest.raises(InputError, match=r"not the base that .* was trained on \(config.json"):
            verb()


def test_the_run_folder_holds_what_the_contract_says(make_recipe, trained_once):
    run = trained_once()
    here = [f"output_dir={run.path}", f"data.train={run.path.parent}/train.jsonl"]
    chosen = [*here, f"quantization.compute_dtype={AUTO}"]  # what auto is here
    assert RunDir.open(run.path).recipe() == Recipe.from_dict(make_recipe().model_dump(), chosen)
    environment = run.environment()
    assert environment["versions"]["bitsandbytes"]
    assert environment["base_model"]["sha256"].keys() == {"config.json", "model.safetensors"}
    assert len(environment["data"][0]["sha256"]) == 64
    report = json.loads(run.data_report_file.read_text())
    assert report["rows"] == 18
    assert report["ends_with_stop_token"] == 1.0
    assert (run.adapter / "chat_template.jinja").is_file()
    assert not [path for path in run.path.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]  # no pickle


@pytest.mark.usefixtures("unplanned")
def test_the_same_recipe_gives_the_same_adapter_byte_for_byte(make_recipe, tmp_path):
    lora = {"lora_dropout": 0.1}
    files = [train(make_recipe(lora=lora, output_dir=str(tmp_path / name))).adapter / methods.WEIGHTS for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = (
        train(make_recipe(lora=lora, output_dir=str(tmp_path / "c"), training={"seed": 7})).adapter / methods.WEIGHTS
    )
    assert other.read_bytes() != files[0].read_bytes()


def test_a_run_that_cannot_be_planned_is_the_run_that_was(make_recipe, tmp_path, request):
    """So that tests about something else need no plan."""
    planned = train(make_recipe(output_dir=str(tmp_path / "planned")))
    request.getfixturevalue("unplanned")
    run = train(make_recipe(output_dir=str(tmp_path / "unplanned")))
    predicted = [json.loads(one.memory_file.read_text())["predicted_bytes"] for one in (planned, run)]
    assert predicted[0] > 0
    assert predicted[1] is None
    assert (run.adapter / methods.WEIGHTS).read_bytes() == (planned.adapter / methods.WEIGHTS).read_bytes()


@pytest.mark.slow
def test_eval_measures_before_and_after_and_training_helped(make_recipe):
    run = train(make_recipe(training={"max_steps": 30, "per_device_train_batch_size": 6}))
    result = evaluate(run.path)
    assert json.loads(run.eval_file.read_text()) == result
    assert result["rows"] == 6
    assert result["loss"] < 0.7 * result["before"]["loss"]
    names = ("loss", "perplexity", "bits_per_byte")
    assert result["before"].keys() == {*names, *(f"{name}_interval" for name in names), "tokens", "metrics"}
    assert set(result["metrics"]) == {"exact_match"}


def test_eval_of_an_exported_model_gives_the_runs_loss(trained_once, tmp_path):
    run = RunDir(shutil.copytree(trained_once().path, tmp_path / "run"))  # scores are kept in it
    export(run.path, tmp_path / "out", dtype="bfloat16")
    rows = write_jsonl(tmp_path / "held.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS[:5]])
    ours, theirs = evaluate(run.path, rows), evaluate(tmp_path / "out", rows)
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=0.02)
    assert "before" not in theirs


def test_eval_without_held_out_rows_says_so(make_recipe):
    run = train(make_recipe(data={"eval_fraction": 0.0}))
    with pytest.raises(InputError, match="give --data"):
        evaluate(run.path)
    with pytest.raises(InputError, match="give --data"):
        evaluate(run.recipe().model.name_or_path)


@pytest.mark.usefixtures("unplanned")
def test_the_model_learns_to_answer_and_to_stop(make_recipe, tmp_path):
    # six questions by heart: the answers are exact only if every token, and the end, was trained
    rows = write_jsonl(tmp_path / "train.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS[:6]])
    recipe = make_recipe(
        lora={"r": 32, "lora_alpha": 64},
        data={"eval_fraction": 0.0},
        training={"max_steps": 70, "per_device_train_batch_size": 6, "learning_rate": 3e-3, "optim": "adamw_torch"},
    )
    run = train(recipe)
    result = evaluate(run.path, rows)
    assert result["metrics"]["exact_match"]["value"] == 1
    assert result["before"]["metrics"]["exact_match"]["value"] == 0
    export(run.path, tmp_path / "out")
    assert chat(tmp_path / "out", CONVERSATIONS[4][0][1], max_new_tokens=60) == CONVERSATIONS[4][1][1]


@pytest.mark.parametrize(("memory", "layers", "said"), [
    ({}, 0, "0 of 2 layers checkpointed\n"),
    ({"gradient_checkpointing": 1}, 1, "1 of 2 layers checkpointed\n"),
    ({"gradient_checkpointing": True, "offload": True}, 2, "2 of 2 layers checkpointed, layer inputs offloaded to CPU memory"),
])  # fmt: skip
def test_a_run_says_and_keeps_which_layers_were_checkpointed_and_its_peak(make_recipe, capsys, memory, layers, said):
    run = train(make_recipe(memory=memory))
    kept = json.loads(run.memory_file.read_text())
    assert (kept["layers"], kept["checkpointed_layers"], kept["offload"]) == (2, layers, memory.get("offload", False))
    assert kept["peak_bytes"] >= kept["rehearsed_bytes"] > 0
    assert kept["predicted_bytes"] > 0
    printed = capsys.readouterr().err
    assert said in printed
    sizes = [size(kept[name]) for name in ("peak_bytes", "predicted_bytes")]
    assert f"peak {sizes[0]} (predicted {sizes[1]}); loss" in printed
    assert f"that the process holds already: {sizes[1]} predicted" in printed
    weights = {
        path.relative_to(run.path) for path in run.path.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt")
    }
    assert weights == {Path("adapter/adapter_model.safetensors"), Path("checkpoints/step-2/tensors.safetensors")}


def test_as_few_layers_are_checkpointed_as_the_budget_needs(make_recipe, capsys):
    peaks = {}
    for layers in (0, 1, 2):
        found = plan(make_recipe(memory={"gradient_checkpointing": layers}))
        peaks[layers] = found["peak_bytes"]
    assert peaks[2] < peaks[1] < peaks[0]
    # a plan for a GPU, which has no context here
    budget = f"{(peaks[1] + peaks[0]) / 2 / 2**20}MiB"
    assert plan(make_recipe(memory={"budget": budget}))["checkpointed_layers"] == 1


def test_what_does_not_fit_is_refused_before_a_weight_is_read(make_recipe, monkeypatch):
    monkeypatch.setattr(base_model, "load", None)
    monkeypatch.setattr("qlora.planner.footprint._HELD_ON_CPU", 0)  # more than all that a tiny model has
    by_rows = {"per_device_train_batch_size": 8, "tokens_per_micro_batch": None}
    recipe = make_recipe(memory={"budget": "0.5MiB"}, training=by_rows)
    with pytest.raises(DoesNotFit) as caught:
        train(recipe)
    assert "does not fit: " in str(caught.value)
    assert "512 KiB are memory.budget" in str(caught.value)
    assert "training.per_device_train_batch_size=4 training.gradient_accumulation_steps=2: " in str(caught.value)
    assert not Path(recipe.output_dir).exists()


@pytest.mark.parametrize(
    ("family", "planned"), some_slow([("bloom", True), ("stablelm", True), ("lfm2", False)], but=[("lfm2", False)])
)
def test_architectures_that_allow_less_train_all_the_same(make_recipe, tmp_path, capsys, family, planned):
    losses = {}
    for setting in ("auto", "off"):
        recipe = make_recipe(
            family,
            kernels=setting,
            training={"max_steps": 3, "learning_rate": 1e-3},
            output_dir=str(tmp_path / setting),
        )
        run = train(recipe)
        records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
        losses[setting] = [record.get("loss", record.get("eval_loss")) for record in records]
        printed = capsys.readouterr().err
        assert "batches without padding" not in printed
        assert ("plan      none: " in printed) is not planned
    assert losses["auto"] == pytest.approx(losses["off"], rel=1e-2)
    if not planned:
        with pytest.raises(InputError, match="this architecture is not supported by the planner"):
            plan(recipe)
    with pytest.raises(InputError, match=r"set data\.packing=false"):
        train(make_recipe(family, data={"packing": True}, output_dir=str(tmp_path / "packed")))


# gemma2 caps its logits: padded rows, torch's own attention, no packing
RUNS = [(f, p) for f in ("llama", "qwen2", "gemma2", "gpt2") for p in (False, True) if not (f == "gemma2" and p)]


@pytest.mark.parametrize(("family", "packing"), some_slow(RUNS, but=[("llama", False)]))
def test_kernels_change_no_loss_of_a_run(make_recipe, tmp_path, capsys, unplanned, family, packing):
    losses, said = {}, {}
    for setting in ("auto", "off"):
        run = train(
            make_recipe(
                family,
                kernels=setting,
                data={"packing": packing},
                training={"max_steps": 6, "learning_rate": 1e-3},
                output_dir=str(tmp_path / setting),
            )
        )
        records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
        losses[setting] = [record.get("loss", record.get("eval_loss")) for record in records]
        (said[setting],) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kernels")]
    assert losses["auto"] == pytest.approx(losses["off"], rel=1e-2)
    assert len(losses["auto"]) == 7
    assert said["off"] == "kernels   off"
    assert "8 LoRA layers" in said["auto"]
    assert ("batches without padding" in said["auto"]) == (family != "gemma2")


@pytest.mark.usefixtures("unplanned")
def test_an_export_that_4_bit_would_undo_is_no_base_for_4_bit(trained_once, make_recipe, tmp_path):
    """Quantizing a dequantized merge gives the codes of the base it was merged onto; the original base's merge does not."""
    run = trained_once()
    for base in ("dequantized", "original"):
        export(run.path, tmp_path / base, overrides=[f"export.base={base}"])
    again = {"name_or_path": str(tmp_path / "dequantized")}
    with pytest.raises(InputError, match=r"would undo its training.* --base original"):
        train(make_recipe(model=again, output_dir=str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()
    assert train(make_recipe(model=again, quantization=None, output_dir=str(tmp_path / "16-bit"))).adapter.is_dir()
    on_original = make_recipe(
        model={"name_or_path": str(tmp_path / "original")}, output_dir=str(tmp_path / "on-original")
    )
    assert train(on_original).adapter.is_dir()
