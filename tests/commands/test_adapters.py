"""Adapters as such: listed with their scores, added up with weights."""

import json
import shutil

import pytest
import torch

from qlora import base_model, methods
from qlora.commands.adapters import adapters
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.jobs.opening.opened_adapter import parse_weighted
from qlora.recipe import Recipe
from qlora.system.errors import InputError, ProofFailed
from tests.conftest import CONVERSATIONS, messages, write_jsonl

pytestmark = pytest.mark.usefixtures("unplanned")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model):
    """Return make(name, **sections) -> a finished run on the tiny Llama, made once for each name."""
    folder, made = tmp_path_factory.mktemp("several"), {}
    rows = write_jsonl(folder / "train.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS])

    def make(name, family="llama", **sections):
        if name not in made:
            values = {
                "model": {"name_or_path": str(tiny_model(family))},
                "lora": {"r": 4, "lora_alpha": 8},
                "data": {"train": str(rows), "max_length": 128, "eval_fraction": 0.25},
                "training": {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
                             "learning_rate": 2e-2, "warmup_ratio": 0},
                "output_dir": str(folder / name),
            }  # fmt: skip
            made[name] = train(Recipe.from_dict({**values, **sections}))
        return made[name]

    return make


@pytest.fixture
def two(runs):
    lora = {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}
    return runs("one"), runs("other", lora=lora)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 60)[None]).logits.float()


# ---- listed ----------------------------------------------------------------------------------------------------------


def test_runs_adapters_and_what_is_damaged_are_listed_with_their_scores(two, tmp_path, capsys):
    one = shutil.copytree(two[0].path, tmp_path / "one")
    evaluate(one)
    shutil.copytree(two[1].path, tmp_path / "deeper" / "other")
    shutil.copytree(two[1].adapter, tmp_path / "one" / "checkpoints" / "checkpoint-2")
    shutil.copytree(two[0].path, tmp_path / "unfinished", ignore=shutil.ignore_patterns("adapter"))
    damaged = shutil.copytree(two[0].path, tmp_path / "damaged")
    (damaged / "adapter" / methods.CONFIG).write_text("{")
    for name, file, text in (
        ("steps", "metrics.jsonl", '{"step": "x", "loss": 1.0}\n'),
        ("scores", "eval.json", '{"loss": 1.0, "metrics": {"exact_match": {"value": "x", "low": null, "high": null}}}'),
    ):
        (shutil.copytree(two[0].path, tmp_path / name) / file).write_text(text)
    shutil.copytree(two[0].adapter, tmp_path / "one" / "adapter.partial")  # as a killed training leaves it
    capsys.readouterr()
    found = {entry["path"].removeprefix(f"{tmp_path}/"): entry for entry in adapters(tmp_path)}
    assert set(found) == {
        *("one", "deeper/other", "one/checkpoints/checkpoint-2", "unfinished", "damaged", "steps", "scores")
    }
    assert "metrics.jsonl line 1: TypeError(\"step is 'x', not a number\")" in found["steps"]["state"]
    assert "eval.json: TypeError(\"exact_match.value is 'x', not a number\")" in found["scores"]["state"]
    assert found["one"]["kind"] == "LoRA r=4"
    assert found["one"]["steps"] == 3
    assert found["one"]["metrics"].keys() == {"exact_match"}
    last = json.loads((one / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["one"]["eval_loss"] == last["eval_loss"]
    assert found["deeper/other"]["kind"] == "LoRA r=6"
    assert found["unfinished"]["state"] == "unfinished"
    assert found["damaged"]["state"].startswith("damaged: ")
    assert found["one/checkpoints/checkpoint-2"]["loss"] is None
    shown = capsys.readouterr().out
    assert "7 in" in shown
    assert "exact match" in shown


def test_a_folder_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*qlora train RECIPE"):
        adapters(tmp_path / "none")
    assert adapters(tmp_path) == []


# ---- added up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])  # PEFT makes the sum of the first one's settings
def test_a_weighted_sum_is_the_sum_of_the_updates_and_exports_proven(two, tmp_path, order):
    one, other = two[::order]
    report = export([f"{one.path}:0.7", f"{other.path}:-0.3"], tmp_path / "out", "float32")
    assert report["verified"]
    exported = transformers_logits(tmp_path / "out")
    recipe = one.recipe()
    base = base_model.to_float32(base_model.load(base_model.find(recipe.model), recipe.model, recipe.quantization))
    deltas = {}
    for run, weight in ((one, 0.7), (other, -0.3)):
        for name, update in methods.read(run.adapter).updates.items():
            delta = weight * update.scaling * update.B_OR.float() @ update.A_RI.float()
            deltas[name] = deltas.get(name, 0) + delta
    hooks = [
        base.get_submodule(name).register_forward_hook(lambda m, x, y, d=delta: y + x[0] @ d.T)
        for name, delta in deltas.items()
    ]
    torch.testing.assert_close(exported, logits(base), atol=1e-4, rtol=1e-4)
    for hook in hooks:
        hook.remove()
    assert (exported - logits(base)).abs().max() > 0.05


def transformers_logits(folder):
    import transformers

    return logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def test_the_whole_weight_on_one_is_that_one(two, tmp_path):
    export(two[0].path, tmp_path / "alone", "float32")
    export([f"{two[0].path}:1", f"{two[1].path}:1e-9"], tmp_path / "sum", "float32")
    torch.testing.assert_close(
        transformers_logits(tmp_path / "sum"), transformers_logits(tmp_path / "alone"), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["runs/a:0.7", "runs/b"], "runs/b: needs a weight other than 0; to combine adapters write RUN:WEIGHT"),
        (["runs/a:0.7", "runs/b:x"], "runs/b:x: needs a weight"),
        (["runs/a:nan", "runs/b:1"], "runs/a:nan: needs a weight"),
        (["runs/a:1", "runs/b:0"], "runs/b:0: needs a weight"),
        (["runs/a:1", "runs/a:2"], "runs/a: listed more than once"),
    ],
)
def test_weights_are_numbers_for_different_runs(targets, expected):
    with pytest.raises(InputError, match=expected):
        parse_weighted(targets)


def test_only_low_rank_updates_on_one_base_add_up(runs, two, tmp_path):
    dora = runs("dora", lora={"r": 4, "use_dora": True})
    head = runs("head", lora={"r": 4, "modules_to_save": ["lm_head"]})
    mistral = runs("mistral", family="mistral")
    for run, expected in ((dora, "DoRA adapters rescale"), (head, "has trained biases or modules, so it cannot be added"),
                          (mistral, "trained on another base")):  # fmt: skip
        with pytest.raises(InputError, match=expected):
            export([f"{two[0].path}:1", f"{run.path}:1"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_sum_that_is_another_one_is_noticed(two, tmp_path, monkeypatch):
    from peft.tuners.lora import LoraModel

    original = LoraModel.add_weighted_adapter
    monkeypatch.setattr(
        LoraModel, "add_weighted_adapter", lambda self, names, weights, *rest, **more: original(
            self, names, [2 * weight for weight in weights], *rest, **more
        )
    )  # fmt: skip
    with pytest.raises(ProofFailed, match="PEFT combined the adapters wrongly in"):
        export([f"{two[0].path}:0.7", f"{two[1].path}:0.3"], tmp_path / "out")
    assert not list(tmp_path.iterdir())
