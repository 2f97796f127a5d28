"""Each method the whole way: trained, evaluated, exported and proven, or refused with what to do instead."""

import csv
import json
from pathlib import Path

import pytest
import torch

from qlora import chat, evaluate, methods
from qlora.commands.export import export
from qlora.commands.plan import plan
from qlora.commands.train import train
from qlora.jobs.opening.opened_model import open_subject
from qlora.recipe import Recipe
from qlora.system.errors import InputError
from tests.conftest import some_slow

RECIPES = Path(__file__).parents[2] / "recipes"

WHOLE_WAY = {
    "ia3": ("llama", {"ia3": {}}),
    "ia3 with biases": ("qwen2", {"ia3": {}}),
    "ia3 of GPT-2": ("gpt2", {"ia3": {}}),
    "oft": ("llama", {"oft": {}}),
    "hira": ("qwen2", {"hira": {"r": 8}}),
    "full": ("llama", {"full": {}, "quantization": None}),
    "full of a tied model": ("gpt2", {"full": {}, "quantization": None}),
    "full of some modules": ("qwen2", {"full": {"modules": ["layers.1", "norm"]}, "quantization": None}),
    "LoRA+": ("llama", {"lora": {"r": 4, "loraplus_lr_ratio": 16}}),
}


@pytest.mark.parametrize("case", some_slow(WHOLE_WAY, but=("ia3", "full")))
def test_it_trains_scores_and_exports_proven(make_recipe, tmp_path, case):
    family, sections = WHOLE_WAY[case]
    recipe = make_recipe(family, **sections, training={"max_steps": 4, "learning_rate": 3e-2})
    planned = plan(recipe)
    run = train(recipe)
    losses = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    losses = [record["loss"] for record in losses if "loss" in record]
    assert losses[-1] < losses[0]
    scores = evaluate(run.path)
    assert scores["loss"] < scores["before"]["loss"]
    report = export(run.path, tmp_path / "out")
    assert report["verified"]
    assert report["merged"]["kl"] < 1e-4
    assert report["base_model"]["kl"] > 10 * report["merged"]["kl"]
    assert planned["components"]["adapter"] > 0


@pytest.mark.parametrize("case", some_slow(["full", "full of a tied model", "full of some modules"], but=["full"]))
def test_trained_weights_are_proven_layer_by_layer_as_they_are_whole(make_recipe, tmp_path, unplanned, case):
    family, sections = WHOLE_WAY[case]
    run = train(make_recipe(family, **sections, training={"max_steps": 2, "learning_rate": 3e-2}))
    reports = [export(run.path, tmp_path / way, overrides=[f"export.verify={way}"]) for way in ("full", "layers")]
    assert [report["verify"] for report in reports] == ["full", "layers"]
    for name in ("live", "merged", "base_model"):
        whole, layers = (report[name] for report in reports)
        assert layers["loss"] == pytest.approx(whole["loss"], abs=1e-5)
        assert layers.get("kl", 0) == pytest.approx(whole.get("kl", 0), rel=1e-2, abs=1e-6)
    assert reports[1]["base_model"]["kl"] > 100 * reports[1]["merged"]["kl"]


UNMERGEABLE = {
    "pfeiffer": ("llama", {"bottleneck": {"size": 16}}),
    "prompt tuning": ("llama", {"prompt_tuning": {"prompt_tuning_init_text": "plus is"}}),
    "prefix tuning": ("qwen2", {"prefix_tuning": {"num_virtual_tokens": 4, "prefix_projection": True}}),
    "prefix tuning of GPT-2": ("gpt2", {"prefix_tuning": {"num_virtual_tokens": 4}}),
    "prefix tuning of experts": ("qwen3-moe", {"prefix_tuning": {"num_virtual_tokens": 4, "init_weights": "zero"}}),
    "prompt tuning of experts": ("qwen3-moe", {"prompt_tuning": {"num_virtual_tokens": 4}}),
    "prompt tuning of GPT-2": ("gpt2", {"prompt_tuning": {"num_virtual_tokens": 4}}),
    "houlsby of GPT-2": ("gpt2", {"bottleneck": {"size": 16, "where": "houlsby"}}),
}


@pytest.mark.parametrize("case", some_slow(UNMERGEABLE, but=("prefix tuning",)))
def test_what_cannot_be_merged_trains_scores_answers_and_says_what_to_do_instead(make_recipe, tmp_path, case):
    family, sections = UNMERGEABLE[case]
    run = train(make_recipe(family, **sections, training={"max_steps": 4, "learning_rate": 3e-2}))
    scores = evaluate(run.path)
    assert scores["loss"] < scores["before"]["loss"]
    for option in ({"dtype": "float16"}, {"gguf": "f16"}, {"overrides": ["export.base=original"]}):
        with pytest.raises(
            InputError, match=r"Serve (them|it) beside the base: .qlora chat RUN.*\. The adapter is exported"
        ):
            export(run.path, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()
    report = export(run.path, tmp_path / "out", overrides=["export.verify=layers"] if family == "llama" else [])
    assert report["verified"]
    assert f"{report['beside']['loss']:.4f}" in (tmp_path / "out" / "README.md").read_text()
    assert report["beside"]["kl"] < 1e-6 < report["base_model"]["kl"]
    assert 1e-6 < report["beside_original"]["kl"] < report["base_model"]["kl"]  # of the base in 16 bit
    ids = torch.arange(4, 60)[None]
    subject = open_subject(run.path)
    with torch.no_grad():
        found = subject.model(input_ids=ids).logits
        with subject.model.disable_adapter():
            base = subject.model(input_ids=ids).logits
    assert not torch.allclose(base, found, atol=1e-2)
    assert isinstance(chat(run.path, "What is 1 plus 1?", max_new_tokens=4), str)


@pytest.mark.slow
def test_the_recipe_for_gpt2_goes_the_whole_way_on_a_small_one(tiny_model, tmp_path):
    reviews = tmp_path / "imdb.csv"
    with reviews.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([[f"What is {n} plus 1? " * (5 + 20 * (n % 3)), n % 2] for n in range(40)])
    overrides = [f"model.name_or_path={tiny_model('gpt2')}", f"data.train={reviews}", f"output_dir={tmp_path}/run",
                 "data.eval_fraction=0.2", "training.max_steps=6", "training.learning_rate=1e-2"]  # fmt: skip
    run = train(Recipe.load(RECIPES / "gpt2" / "imdb.yaml", overrides))
    assert set(methods.read(run.adapter).updates) == {f"transformer.h.{n}.attn.c_attn" for n in range(2)}
    scores = evaluate(run.path)
    assert scores["loss"] < scores["before"]["loss"]
    assert export(run.path, tmp_path / "out")["verified"]
