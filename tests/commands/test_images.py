"""Image classification, all the way: folders of images -> a trained run -> scores -> a folder that the pipeline opens."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from qlora import evaluate, export, plan, train
from qlora.commands.chat import chat
from qlora.commands.data import inspect_data
from qlora.commands.push import push
from qlora.recipe import Recipe
from qlora.system.errors import InputError
from tests.data.images import encoded, picture

from .images import model_folder, models, recipe_of, where  # noqa: F401 (fixtures)

_IA3 = {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}


def tensor_names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def in_the_pipeline(folder, path):
    from transformers import pipeline

    return pipeline("image-classification", str(folder))(str(path))


@pytest.fixture(scope="module")
def trained(models, where, tmp_path_factory):  # noqa: F811
    """A run of ViT with its base in NF4, and its export."""
    root = tmp_path_factory.mktemp("vit")
    run = train(recipe_of(models["vit"], where, root / "run"))
    return run, root / "out", export(run.path, root / "out")


def test_it_learns_and_is_scored(trained, where):  # noqa: F811
    run, *_ = trained
    found = evaluate(run.path)
    assert found["labels"] == ["blue", "green", "red"]
    assert found["metrics"]["accuracy"]["value"] > 0.9 > found["before"]["metrics"]["accuracy"]["value"]
    assert np.array(found["confusion"]).sum(1).tolist() == [5, 5, 5]
    assert found["data"]["files"][0]["path"] == str(where / "eval")
    assert json.loads(run.eval_file.read_text())["metrics"] == found["metrics"]
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [line["tokens"] for line in lines if "learning_rate" in line][-1] == 120  # images


def test_the_export_is_proven_and_opens_in_the_pipeline(trained, models, where):  # noqa: F811
    run, out, report = trained
    assert report["verified"]
    assert report["merged"]["logits"] < 1e-4 < report["base_model"]["logits"]
    processor = "preprocessor_config.json"
    assert (out / processor).read_bytes() == (models["vit"] / processor).read_bytes()
    assert not list(out.glob("*token*"))
    for name in ("blue", "green", "red"):
        best = in_the_pipeline(out, where / "eval" / name / "16.png")[0]
        assert best["label"] == name
    assert evaluate(out, where / "eval")["metrics"] == evaluate(run.path)["metrics"]


def test_a_run_has_what_it_needs_and_no_tokenizer(trained):
    run, *_ = trained
    assert {path.name for path in run.adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "preprocessor_config.json",
    }
    rows = json.loads(run.proof_rows_file.read_text())["rows"]
    assert rows[0].keys() == {"jpeg", "label"}
    recorded = run.environment()["base_model"]["quantized_modules"]
    assert len(recorded) == 12
    assert not any("classifier" in name or "patch" in name for name in recorded)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deit", {}),
        ("swin", {}),
        ("swin", {"quantization": None, "full": {}, "training": {"learning_rate": 1e-3}}),
        ("vit", {"ia3": _IA3, "training": {"learning_rate": 3e-2}}),
        ("convnext", {"training": {"learning_rate": 1e-2}}),
    ],
    ids=["deit", "swin", "swin-full", "vit-ia3", "convnext"],
)
def test_other_models_and_methods(models, where, tmp_path, name, changes):  # noqa: F811
    run = train(recipe_of(models[name], where, tmp_path / "run", **changes))
    report = export(run.path, tmp_path / "out")
    assert report["verified"]
    assert evaluate(run.path)["metrics"]["accuracy"]["value"] > 0.6
    transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    assert tensor_names(tmp_path / "out") == tensor_names(tmp_path / "saved")  # the names of the hub's files
    assert len(in_the_pipeline(tmp_path / "out", where / "eval" / "red" / "16.png")) == 3


@pytest.mark.usefixtures("unplanned")
def test_a_classifier_of_the_same_classes_goes_on_and_one_of_others_begins_anew(trained, where, tmp_path):  # noqa: F811
    _, out, _ = trained
    training = {"max_steps": 1, "learning_rate": 1e-6}
    again = train(recipe_of(out, where, tmp_path / "again", quantization=None, training=training))
    assert evaluate(again.path)["before"]["metrics"]["accuracy"]["value"] > 0.9
    others = {"train": str(where / "train"), "eval": str(where / "eval"), "labels": ["red", "green", "blue"]}
    anew = train(recipe_of(out, where, tmp_path / "anew", quantization=None, training=training, data=others))
    assert evaluate(anew.path)["before"]["metrics"]["accuracy"]["value"] < 0.9


@pytest.mark.usefixtures("unplanned")
def test_a_run_that_goes_on_is_the_same_to_the_bit(models, where, tmp_path):  # noqa: F811
    lora = {"lora": {"lora_dropout": 0.1}}  # and Swin drops paths at random
    whole = train(recipe_of(models["swin"], where, tmp_path / "whole", training={"max_steps": 3}, **lora))
    half = train(recipe_of(models["swin"], where, tmp_path / "half", training={"max_steps": 2}, **lora))
    on = train(recipe_of(models["swin"], where, half.path, training={"max_steps": 3}, **lora), resume=True)
    one, other = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, on))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.usefixtures("unplanned")
def test_an_image_that_changed_is_no_longer_the_same_run(models, where, tmp_path):  # noqa: F811
    shutil.copytree(where, tmp_path / "own")
    recipe = recipe_of(models["vit"], tmp_path / "own", tmp_path / "run", training={"max_steps": 1})
    train(recipe)
    picture(seed=77).save(tmp_path / "own" / "train" / "red" / "0.png")
    longer = recipe_of(models["vit"], tmp_path / "own", tmp_path / "run", training={"max_steps": 2})
    with pytest.raises(InputError, match=r"data: was .*\n.*rows: was"):
        train(longer, resume=True)


# ---- before training -------------------------------------------------------------------------------------------------


def test_what_the_model_will_see_is_a_page_of_small_images(models, where, tmp_path, capsys):  # noqa: F811
    shutil.copytree(where, tmp_path / "own")
    (tmp_path / "own" / "train" / "red" / "cut.png").write_bytes(encoded(picture())[:200])
    page = tmp_path / "page.html"
    recipe = recipe_of(models["vit"], tmp_path / "own", tmp_path / "run", data={"on_bad_row": "skip"})
    report = inspect_data(recipe, html=page)
    assert [one["rows"] for one in report["classes"]] == [16, 16, 16]
    assert report["image_sizes"]["width"]["p50"] == 40
    text = page.read_text()
    assert page.stat().st_size < 200_000
    assert "red/cut.png" in text
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(pictures) == 48
    assert {Image.open(io.BytesIO(base64.b64decode(one))).size for one in pictures} == {(40, 32)}
    assert "images all of 40 x 32 pixels" in capsys.readouterr().err


def test_a_plan_counts_images(models, where, tmp_path):  # noqa: F811
    recipe = recipe_of(models["vit"], where, tmp_path / "run")
    found = plan(recipe, card="3060")
    assert found["fits"]
    assert found["counts"] == "images"
    assert found["limits"].keys() == {"micro_batch", "r"}
    with pytest.raises(InputError, match="--plot draws memory by the length of rows"):
        plan(recipe, card="3060", plot=tmp_path / "plot.png")
    absent = recipe_of(models["vit"], tmp_path / "nowhere", tmp_path / "run")
    assert plan(absent, card="3060")["peak_bytes"] == pytest.approx(found["peak_bytes"], rel=0.01)


REFUSED = {
    "data.packing": {"data": {"packing": True}},
    "data.max_length": {"data": {"max_length": 512}},
    "data.overlong": {"data": {"overlong": "truncate"}},
    "data.train_on": {"data": {"train_on": "all"}},
    "training.tokens_per_micro_batch": {"training": {"tokens_per_micro_batch": 4096}},
    "training.neftune_noise_alpha": {"training": {"neftune_noise_alpha": 5.0}},
    "training.group_by_length": {"training": {"group_by_length": True}},
    "model.new_tokens": {"model": {"name_or_path": "m", "new_tokens": ["<x>"]}},
    "lora.init_lora_weights eva": {"lora": {"init_lora_weights": "eva"}},
    "prompt_tuning": {"prompt_tuning": {}},
    "export.verify layers": {"export": {"verify": "layers"}},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_images_do_not_have_is_refused_by_name(where, field):  # noqa: F811
    with pytest.raises(InputError, match=re.escape(field)):
        recipe_of("m", where, "out", **REFUSED[field])


def test_words_and_servers_of_words_are_refused(trained, tmp_path):
    run, out, _ = trained
    with pytest.raises(InputError, match="a prompt is words, and this is a model for image-classification"):
        chat(out, "hello")
    with pytest.raises(InputError, match="--gguf f16 is for text-generation"):
        export(run.path, tmp_path / "gguf", gguf="f16")


def test_a_folder_without_its_image_processor_and_one_of_another_size(models, where, tmp_path):  # noqa: F811
    folder = Path(shutil.copytree(models["vit"], tmp_path / "vit"))
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    recipe = recipe_of(folder, where, tmp_path / "run")
    for change, said in (
        (
            {"size": {"height": 48, "width": 48}},
            "makes images of 48 x 48 pixels, and config.json of the model is for 32 x 32",
        ),
        ({"size": {"shortest_edge": 32}}, "a batch needs them alike"),
        ({"image_mean": [0.5]}, "no usable image processor"),
    ):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=said):
            inspect_data(recipe)
    path.unlink()
    with pytest.raises(InputError, match=r"no preprocessor_config.json"):
        inspect_data(recipe)


def test_a_model_of_words_is_refused_for_images(where, tmp_path, tiny_model):  # noqa: F811
    with pytest.raises(InputError, match="ForImageClassification"):
        inspect_data(recipe_of(tiny_model("llama"), where, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.usefixtures("unplanned")
def test_the_second_head_of_deit_is_left_in_the_files(where, tmp_path):  # noqa: F811
    folder = model_folder(tmp_path, "deit", "ForImageClassificationWithTeacher")
    run = train(recipe_of(folder, where, tmp_path / "run", training={"max_steps": 2}))
    assert export(run.path, tmp_path / "out")["verified"]
    assert {name for name in tensor_names(tmp_path / "out") if "classifier" in name} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_what_is_pushed_of_a_run_and_of_an_export(trained):
    run, out, _ = trained
    for target in (run.path, out):
        names = {one["name"] for one in push(target, "me/pets", base="me/vit", dry_run=True)["files"]}
        assert "preprocessor_config.json" in names
        assert not any("token" in name for name in names)


def test_the_recipe_of_the_run_is_a_recipe(trained):
    run, *_ = trained
    recipe = Recipe.load(run.recipe_file)
    assert (recipe.task, recipe.data.labels) == ("image-classification", ["blue", "green", "red"])
