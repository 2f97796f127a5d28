"""Text classification the whole way: rows, plan, training, scores, an ordinary folder, and a pipeline that opens it."""

import json
import signal

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora import base_model, chat, evaluate, inspect_data, methods
from qlora.commands.export import export
from qlora.commands.push import push
from qlora.commands.talk import talk
from qlora.commands.train import train
from qlora.jobs.opening.chosen_task import task_of
from qlora.recipe import Recipe
from qlora.system.errors import InputError, Interrupted
from qlora.training.objectives.classification import Trainer
from tests import forked
from tests.classifiers import BAD, FAMILIES, GOOD, ROWS
from tests.conftest import some_slow, write_jsonl

pytestmark = pytest.mark.usefixtures("unplanned")  # tests/planner/test_plan_of_classes.py is about plans


def live_model(run):
    """Return the trained model in float32, as transformers and PEFT compute it."""
    recipe = run.recipe()
    checkpoint = base_model.find(recipe.model, task=task_of(recipe))
    return base_model.to_float32(
        methods.load(base_model.load(checkpoint, recipe.model, recipe.quantization), run.adapter)
    )


def losses(run):
    records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def logits(model, tokenizer, texts, side="right", **more):
    tokenizer.padding_side = side
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt"), **more).logits.float()


def scores(found):
    """Return {class: probability} of what a pipeline returns for one text, in a list of its own or not."""
    return {one["label"]: one["score"] for one in (found[0] if isinstance(found[0], list) else found)}


LEARN_FAST = ("distilbert", "llama", "qwen2")  # of random numbers, in some steps
TEXTS = [ROWS[0]["text"], "film number 9 is awful and 无聊 , a poor thing", "fine"]


@pytest.mark.parametrize("family", some_slow(FAMILIES, but=["bert"]))
def test_it_trains_scores_and_exports_a_folder_that_a_pipeline_opens(classify_recipe, tmp_path, family):
    recipe = classify_recipe(family, training={"max_steps": 24})
    run = train(recipe)
    assert run.recipe().data.labels == ["neg", "pos"]
    found = evaluate(run.path)
    if family in LEARN_FAST:
        assert found["metrics"]["accuracy"]["value"] > found["majority"]["accuracy"]["value"]
        assert found["loss"] < found["before"]["loss"]
    assert sum(map(sum, found["confusion"])) == found["rows"] == 20
    report = export(run.path, tmp_path / "out", dtype="float32")
    assert report["verified"]
    assert report["base_model"]["logits"] > 10 * report["merged"]["logits"]

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "neg", "1": "pos"}
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert not (tmp_path / "out" / "generation_config.json").exists()
    exported = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer, live = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), live_model(run)
    ours = logits(live, tokenizer, TEXTS)
    with live.disable_adapter():
        of_base = logits(live, tokenizer, TEXTS)
    torch.testing.assert_close(logits(exported, tokenizer, TEXTS), ours, rtol=1e-3, atol=1e-4)
    assert (ours - of_base).abs().max() > 0.05

    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), top_k=None, dtype=torch.float32)
    for text, each in zip(TEXTS, ours.softmax(-1), strict=True):
        assert scores(classify(text)) == pytest.approx(dict(zip(["neg", "pos"], each.tolist(), strict=True)), abs=1e-4)
    assert classify(TEXTS, batch_size=3, truncation=True)  # which needs a pad token
    assert {line.split("  ")[0] for line in chat(tmp_path / "out", TEXTS[2]).splitlines()} == {"neg", "pos"}


# padding that the model looked at would give other logits
@pytest.mark.parametrize("family", ["llama", "bert", "modernbert"])
def test_a_text_has_the_same_logits_alone_and_beside_longer_ones(classify_recipe, family):
    live = live_model(train(classify_recipe(family, training={"max_steps": 1})))
    tokenizer = transformers.AutoTokenizer.from_pretrained(live.config.name_or_path)
    together = logits(live, tokenizer, TEXTS)
    alone = torch.cat([logits(live, tokenizer, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    if family == "llama":
        torch.testing.assert_close(logits(live, tokenizer, TEXTS, "left"), alone, rtol=1e-4, atol=1e-4)


METHODS = {
    "adalora": {"adalora": {"init_r": 4, "target_r": 2}},
    "dora": {"lora": {"use_dora": True}},
    "ia3": {"ia3": {}},
    "oft": {"oft": {"oft_block_size": 16}},
    "hira": {"hira": {"r": 8}},
    "full": {"full": {}, "quantization": None},
    "head and one layer": {"full": {"modules": ["layer.1"]}, "quantization": None},
    "16 bit": {"quantization": None},
    "head named too": {"lora": {"modules_to_save": ["classifier"]}},
}


@pytest.mark.parametrize("case", some_slow(METHODS, but=("dora", "full")))
def test_the_head_is_trained_whole_with_every_method_and_proven(classify_recipe, tmp_path, case):
    recipe = classify_recipe("bert", **METHODS[case])
    run = train(recipe)
    tokenizer, live = transformers.AutoTokenizer.from_pretrained(recipe.model.name_or_path), live_model(run)
    report = export(run.path, tmp_path / "out")
    assert report["verified"]
    exported = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = logits(live, tokenizer, TEXTS)
    torch.testing.assert_close(logits(exported, tokenizer, TEXTS), ours, rtol=1e-2, atol=1e-2)
    task = base_model.Task(recipe.task, ("neg", "pos"), recipe.training.seed)
    start = base_model.load(base_model.find(recipe.model, task=task), recipe.model, None).state_dict()
    for name in ("classifier.weight", "classifier.bias", "bert.pooler.dense.weight"):
        assert (exported.state_dict()[name] - start[name].float()).abs().max() > 1e-3, name


@pytest.mark.slow
def test_bottleneck_adapters_are_exported_with_the_head_and_without_the_base(classify_recipe, tmp_path):
    recipe = classify_recipe(
        "distilbert", bottleneck={"size": 8, "where": "houlsby"}, training={"max_steps": 24, "learning_rate": 1e-2}
    )
    run = train(recipe)
    found = evaluate(run.path)
    assert found["loss"] < found["before"]["loss"]
    assert export(run.path, tmp_path / "out")["verified"]
    tokenizer, live = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), live_model(run)
    base = base_model.find(recipe.model, task=base_model.Task(recipe.task, ("neg", "pos"), recipe.training.seed))
    written, plain = (base_model.to_float32(base_model.load(base, recipe.model, recipe.quantization)) for _ in "12")
    written = methods.load(written, tmp_path / "out")
    assert torch.equal(logits(written, tokenizer, TEXTS), logits(live, tokenizer, TEXTS))
    with written.disable_adapter():
        assert torch.equal(logits(written, tokenizer, TEXTS), logits(plain, tokenizer, TEXTS))
    assert torch.equal(logits(written, tokenizer, TEXTS), logits(live, tokenizer, TEXTS))
    for name in ("classifier.weight", "pre_classifier.weight"):
        assert not torch.equal(written.get_parameter(name), plain.get_parameter(name)), name


def test_stopped_and_resumed_it_is_the_run_that_was_not(classify_recipe, tmp_path, monkeypatch):
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "eval_steps": 2}
    sections = {"data": {"class_weights": "balanced"}, "lora": {"lora_dropout": 0.1}, "training": settings}
    whole = train(classify_recipe("bert", **sections, output_dir=str(tmp_path / "whole")))
    recipe = classify_recipe("bert", **sections, output_dir=str(tmp_path / "stopped"))
    original = Trainer.training_step

    def stopped(self, *args, **kwargs):
        if self.state.global_step == 2 and self.saving.stop.number is None:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", stopped)
        with pytest.raises(Interrupted):
            train(recipe)
    changed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"class_weights": None})})
    with pytest.raises(InputError, match=r"data\.class_weights: was"):
        train(changed, resume=True)
    resumed = train(recipe, resume=True)
    assert losses(resumed) == losses(whole)
    one, other = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any("classifier" in name for name in one)


@pytest.mark.parametrize("weights", [pytest.param(None, marks=pytest.mark.slow), {"pos": 9.0}])
def test_the_loss_of_a_step_is_the_weighted_mean_of_its_rows_however_they_are_split(classify_recipe, tmp_path, weights):
    plain = {
        "quantization": None,
        "model": {"dtype": "float32"},
        "data": {"class_weights": weights, "eval_fraction": 0.0},
    }

    def first(rows, steps):
        training = {"max_steps": 1, "per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        run = train(classify_recipe("llama", **plain, training=training, output_dir=str(tmp_path / str(rows))))
        record = json.loads(run.metrics_file.read_text().splitlines()[0])
        return record["loss"], record["grad_norm"]

    found = first(len(ROWS), 1)
    assert found == pytest.approx(first(len(ROWS) // 5, 5), rel=1e-4)
    recipe = classify_recipe("llama", **plain)
    task = base_model.Task(recipe.task, ("neg", "pos"), recipe.training.seed)
    model = base_model.load(base_model.find(recipe.model, task=task), recipe.model, None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe.model.name_or_path)
    right = torch.tensor([int(row["label"] == "pos") for row in ROWS])
    each = torch.nn.functional.cross_entropy(
        logits(model, tokenizer, [row["text"] for row in ROWS]), right, reduction="none"
    )
    weight = torch.where(right == 1, 9.0 if weights else 1.0, 1.0)
    assert found[0] == pytest.approx((weight * each).sum().item() / weight.sum().item(), rel=1e-4)


def test_a_classifier_is_trained_further_with_its_head(classify_recipe, tmp_path):
    run = train(classify_recipe("distilbert", training={"max_steps": 40}))
    export(run.path, tmp_path / "first")
    again = classify_recipe("distilbert", model={"name_or_path": str(tmp_path / "first")}, output_dir=str(tmp_path / "again"),
                            quantization=None, training={"max_steps": 1})  # fmt: skip
    further = train(again)
    assert evaluate(further.path)["before"]["loss"] == pytest.approx(evaluate(run.path)["loss"], abs=0.1)
    other = classify_recipe("distilbert", model={"name_or_path": str(tmp_path / "first")}, output_dir=str(tmp_path / "other"),
                            data={"labels": ["pos", "neg"]}, quantization=None, training={"max_steps": 1})  # fmt: skip
    assert evaluate(train(other).path)["before"]["loss"] > 0.3  # a head for other classes is new
    adapter = classify_recipe("distilbert", model={"adapter_name_or_path": str(run.path)}, training={"max_steps": 1},
                              output_dir=str(tmp_path / "adapter"))  # fmt: skip
    assert losses(train(adapter))[0] < losses(run)[0] - 0.1
    renamed = [row | {"label": {"pos": "yes", "neg": "no"}[row["label"]]} for row in ROWS]
    with pytest.raises(InputError, match=r"its classes are neg, pos, and those of this training no, yes"):
        train(classify_recipe("distilbert", renamed, model={"adapter_name_or_path": str(run.path)},
                              output_dir=str(tmp_path / "renamed")))  # fmt: skip


def test_pairs_and_many_classes_go_the_whole_way(classify_recipe, tmp_path):
    rows = [{"text": f"is {word} the word", "text_pair": f"it is {other}", "label": f"w{n % 7}"}
            for n, word in enumerate((*GOOD, *BAD)) for other in (*GOOD, *BAD)]  # fmt: skip
    run = train(classify_recipe("bert", rows, data={"class_weights": "balanced"}))
    assert len(evaluate(run.path)["labels"]) == 7
    assert export(run.path, tmp_path / "out", dtype="float32")["verified"]
    pair = {"text": rows[0]["text"], "text_pair": rows[0]["text_pair"]}
    tokenizer, live = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), live_model(run)
    with torch.no_grad():
        expected = live(**tokenizer(*pair.values(), return_tensors="pt")).logits.float().softmax(-1)[0]
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), top_k=None, dtype=torch.float32)
    found = scores(classify(pair))
    assert [found[f"w{n}"] for n in range(7)] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.fixture
def finished(classify_recipe):
    return train(classify_recipe("bert", training={"max_steps": 2}))


def test_what_a_classifier_does_not_have_is_refused_by_name(finished, classify_recipe, tmp_path):
    with pytest.raises(
        InputError, match="--gguf f16 is for text-generation, and this is a model for text-classification"
    ):
        export(finished.path, tmp_path / "out", gguf="f16")
    with pytest.raises(InputError, match=r"a conversation is for text-generation.*--prompt TEXT"):
        talk(finished.path)
    with pytest.raises(InputError, match="--system is for models that answer with words"):
        chat(finished.path, "good", system="You are kind.")
    with pytest.raises(InputError, match=r"an adapter for SEQ_CLS; .*export that: qlora export RUN"):
        export(finished.adapter, tmp_path / "out", model=finished.recipe().model.name_or_path)
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a", "label": "pos"}\n{"text": "b", "label": "odd"}\n')
    with pytest.raises(
        InputError, match=r"other\.jsonl(.|\n)*line 2  label 'odd' is not one of the classes of the training: neg, pos"
    ):
        evaluate(finished.path, other)
    with pytest.raises(InputError, match="every row has the label 'pos'"):
        train(classify_recipe("bert", [row for row in ROWS if row["label"] == "pos"], output_dir=str(tmp_path / "one")))
    words = {**classify_recipe("bert").model_dump(exclude={"task", "training"}), "output_dir": str(tmp_path / "words")}
    words["data"] = {"train": words["data"]["train"]}
    words["model"]["name_or_path"] = str(tmp_path / "exported")
    export(finished.path, tmp_path / "exported")
    with pytest.raises(
        InputError, match=r"a model for text-classification .BertForSequenceClassification., not for text-gen"
    ):
        train(Recipe.from_dict(words))


def test_rows_beyond_the_positions_of_an_encoder_are_refused_before_training(classify_recipe, tmp_path):
    # of RoBERTa's 65 positions the first is for padding
    rows = [*ROWS, {"text": "good " * 63, "label": "pos"}]
    with pytest.raises(InputError, match="65 tokens, the model has 64 positions"):
        train(classify_recipe("roberta", rows, data={"max_length": 512}))
    rows[-1]["text"] = "good " * 62
    assert losses(train(classify_recipe("roberta", rows, data={"max_length": 512}, training={"max_steps": 2})))


def test_numbers_for_classes_that_have_names_are_said_to_be_places(finished, tmp_path, capsys):
    rows = [{"text": "很好", "label": 1}, {"text": "很差", "label": 0}]
    file = write_jsonl(tmp_path / "coded.jsonl", rows)
    evaluate(finished.path, file)
    assert (
        f"{file}: 2 rows have a number for their class, which is its place: 0 is neg, 1 is pos"
        in capsys.readouterr().err
    )


def test_the_command_line_says_it_as_json(finished, tmp_path, classify_recipe):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(classify_recipe("bert").to_yaml(), encoding="utf-8")
    done = forked.run("data", recipe, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [one["label"] for one in report["classes"]] == ["neg", "pos"]
    assert sum(one["rows"] for one in report["classes"]) == report["rows"] == 60
    assert "classes   2: '" in done.stderr
    done = forked.run("eval", finished.path, "--json")
    assert json.loads(done.stdout)["metrics"]["accuracy"].keys() == {"value", "low", "high"}
    done = forked.run("chat", finished.path, "--prompt", "很好", "--json")
    assert {line.split("  ")[0] for line in json.loads(done.stdout)["answer"].splitlines()} == {"neg", "pos"}
    done = forked.run("chat", finished.path)
    assert (done.returncode, "classify a text with --prompt TEXT" in done.stderr) == (2, True)
    page = tmp_path / "page.html"
    inspect_data(classify_recipe("bert"), html=page)
    assert "<h2>Classes</h2>" in page.read_text(encoding="utf-8")


def test_the_cards_say_how_to_classify(finished, tmp_path, monkeypatch):
    evaluate(finished.path)
    export(finished.path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for said in (
        "pipeline_tag: text-classification",
        'pipeline("text-classification", "FOLDER")',
        "neg, pos",
        "| accuracy on 20 rows",
    ):
        assert said in card
    assert "chat template" not in card
    said = []
    monkeypatch.setattr("qlora.commands.push.show", lambda text: said.append(str(text)))
    push(finished.path, "me/mine", dry_run=True, base="me/base")
    assert "AutoModelForSequenceClassification.from_pretrained" in said[0]
    assert "num_labels=2" in said[0]
    assert "llm_int8_skip_modules=['bert.pooler', 'classifier']" in said[0]
