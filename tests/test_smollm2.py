"""The real model: SmolLM2-135M-Instruct as the quickstart uses it, a few steps of real training, and a proven export."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import quickstart_data
import quickstart_model

from qlora import base_model
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.kernels import attention
from qlora.recipe import Model, Recipe
from tests.conftest import AUTO

FOLDER = quickstart_model.cache_folder() / "SmolLM2-135M-Instruct"
needs_model = pytest.mark.skipif(not FOLDER.is_dir(), reason="no model; python scripts/quickstart_model.py makes it")


def test_train_and_test_rows_share_no_name_item_phrasing_date_or_time(tmp_path):
    for number, split in enumerate(("train", "test")):
        quickstart_data.write(tmp_path / split, 400, number, seed=1)
    answers = {}
    for split in ("train", "test"):
        rows = [json.loads(line)["messages"] for line in (tmp_path / split).read_text().splitlines()]
        answers[split] = [json.loads(row[2]["content"]) for row in rows]
        for row, answer in zip(rows, answers[split], strict=True):
            message = row[1]["content"].lower()
            assert all(answer[key].lower() in message for key in ("what", "who"))
    for key in ("date", "time", "who", "what"):
        assert {a[key] for a in answers["train"]}.isdisjoint({a[key] for a in answers["test"]})
    for lists in (quickstart_data.FIRST_NAMES, quickstart_data.LAST_NAMES, quickstart_data.QUALIFIERS, quickstart_data.NOUNS,
                  quickstart_data.PHRASINGS):  # fmt: skip
        assert set(lists[0]).isdisjoint(lists[1])


def test_the_task_is_the_same_bytes_every_time(tmp_path):
    for name in ("a", "b"):
        quickstart_data.write(tmp_path / name, 50, 0, seed=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@needs_model
def test_the_converted_model_has_the_known_weights():
    assert quickstart_model.tensors_sha256(FOLDER) == quickstart_model.TENSORS_SHA256


@needs_model
def test_its_rows_are_joined_in_16_bit_too():
    section = Model(name_or_path=str(FOLDER))
    assert attention.joins(base_model.load(base_model.find(section), section, None))


@needs_model
def test_a_real_model_learns_in_a_few_steps_and_its_export_is_proven(tmp_path):
    quickstart_data.write(tmp_path / "train.jsonl", 16, 0, seed=1)
    quickstart_data.write(tmp_path / "test.jsonl", 2, 1, seed=1)
    path = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
    overrides = [f"model.name_or_path={FOLDER}", f"data.train={tmp_path}/train.jsonl", f"data.eval={tmp_path}/test.jsonl",
                 f"output_dir={tmp_path}/run", "training.max_steps=4", "training.warmup_ratio=0",
                 "training.gradient_accumulation_steps=1", "training.learning_rate=2e-3"]  # fmt: skip
    run = train(Recipe.load(path, overrides))
    records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] > 1.2  # the untrained model's, 1.5 nats a token
    assert losses[-1] < 0.5 * losses[0]

    report = export(run.path, tmp_path / "out")
    assert report["verified"]
    assert report["merged"]["kl"] < 2e-5  # measured 2e-6
    assert report["merged"]["top1"] > (0.99 if AUTO == "bfloat16" else 0.96)  # of 100 positions; near ties flip
    assert report["base_model"]["kl"] > 0.1
    assert len(report["modules"]) == 210
