"""Each method the whole way: trained, evaluated, exported and proven, or refused with what to do instead."""

import json

import pytest

from qlora import evaluate
from qlora.commands.export import export
from qlora.commands.plan import plan
from qlora.commands.train import train

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


@pytest.mark.parametrize("case", WHOLE_WAY)
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
