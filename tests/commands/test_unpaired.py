"""Unpaired answers go the whole way: recipe, distance from the reference, checkpoint and resume, evaluation, export."""

import pytest

from qlora.commands.data import inspect_data
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.recipe import Recipe
from qlora.system.errors import InputError
from tests.commands.test_preferences import ROWS as PAIRS
from tests.commands.test_preferences import assert_same, records, whole_and_stopped
from tests.conftest import some_slow, write_jsonl

ROWS = [
    {"prompt": row["prompt"], "completion": row[which], "label": which == "chosen"}
    for number, row in enumerate(PAIRS)
    for which in [("chosen", "rejected")[number % 2]]
]


@pytest.fixture
def unpaired(make_recipe, tmp_path):
    """Return unpaired(kto, rows=..., **sections) -> a Recipe."""

    def unpaired(kto=None, rows=ROWS, **sections):
        path = write_jsonl(tmp_path / "unpaired.jsonl", rows)
        values = {
            "kto": {"beta": 0.5} | (kto or {}),
            "training": {"eval_steps": 2, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
            | sections.pop("training", {}),
            "data": {"train": str(path)} | sections.pop("data", {}),
        }
        return make_recipe(**values, **sections)

    return unpaired


@pytest.mark.parametrize(
    "kto", [{}, pytest.param({"loss_type": "apo_zero_unpaired"}, marks=pytest.mark.slow)], ids=["kto", "apo"]
)
def test_a_run_learns_what_is_good_and_its_evaluation_says_so(unpaired, kto, capsys):
    recipe = unpaired(kto, training={"max_steps": 8})
    run = train(recipe)
    steps = [one for one in records(run) if "loss" in one]
    assert steps[0]["loss"] == pytest.approx(0.5, abs=0.02)  # the reference is the model as it begins
    assert max(one.get("rewards/margins", 0) for one in steps) > 0.1
    assert steps[0]["kl"] == pytest.approx(0, abs=0.05)
    assert (max(one["kl"] for one in steps) > 0.1) == (kto == {})
    last = [one for one in records(run) if "eval_loss" in one][-1]
    assert last["rewards/chosen"] > last["rewards/rejected"]
    assert "answers   to 18 prompts" in capsys.readouterr().err
    result = evaluate(run.path)
    assert result["rows"] < 6  # of 6 held-out ones those with good answers, whose loss and answers are measured
    margin = result["change"]["desirable_margin"]
    assert margin["value"] > 0
    assert margin["low"] is margin["high"] is None  # of fewer than five good ones
    now, before = (one["metrics"]["desirable_margin"]["value"] for one in (result, result["before"]))
    assert now - before == pytest.approx(margin["value"])
    assert "desirable margin" in capsys.readouterr().out


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("together", some_slow(["auto", None], [None]))
def test_a_run_that_was_stopped_goes_on_to_the_bit(unpaired, tmp_path, monkeypatch, together):
    whole, recipe = whole_and_stopped(unpaired, tmp_path, monkeypatch, together)
    assert_same(train(recipe, resume=True), whole)


@pytest.mark.usefixtures("unplanned")
def test_a_step_is_the_same_however_its_rows_are_split(unpaired, tmp_path):
    """A distance over a micro-batch, as trl has it, would be another with other micro-batches."""
    found = []
    for rows, steps in ((4, 1), (1, 4), (2, 2)):
        training = {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": steps,
            "tokens_per_micro_batch": None,
        }
        section = {"compute_dtype": "float32"}
        run = train(unpaired(training=training, quantization=section, output_dir=str(tmp_path / f"{rows}")))
        found.append([(one["loss"], one["kl"], one["grad_norm"]) for one in records(run) if "loss" in one])
    assert found[0][-1][1] > 0.05
    for other in found[1:]:
        for expected, step in zip(found[0], other, strict=True):
            assert step == pytest.approx(expected, rel=2e-3, abs=1e-4)


@pytest.mark.usefixtures("unplanned")
def test_a_distance_that_does_not_fit_is_measured_in_halves(unpaired, tmp_path, monkeypatch):
    from qlora.training.objectives.unpaired import UnpairedPreference

    training = {"tokens_per_micro_batch": None}
    whole = train(
        unpaired(training=training, quantization={"compute_dtype": "float32"}, output_dir=str(tmp_path / "whole"))
    )
    original = UnpairedPreference._summed_ratios

    def refused(self, model, part):
        if len(part["reference"]) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return original(self, model, part)

    monkeypatch.setattr(UnpairedPreference, "_summed_ratios", refused)
    run = train(
        unpaired(training=training, quantization={"compute_dtype": "float32"}, output_dir=str(tmp_path / "halves"))
    )
    steps = [[one for one in records(each) if "loss" in one] for each in (whole, run)]
    for one, other in zip(*steps, strict=True):
        assert other["kl"] == pytest.approx(one["kl"], abs=1e-4)


@pytest.mark.slow
def test_pairs_are_unpaired_rows_too_and_an_export_is_proven(unpaired, tmp_path, capsys):
    recipe = unpaired(rows=PAIRS)
    run = train(recipe)
    assert "18 good, 18 bad" in capsys.readouterr().err
    assert evaluate(run.path)["rows"] == 6
    of_pairs = evaluate(run.path, data_file=recipe.data.train[0].path)  # measured as pairs, as of any run
    assert of_pairs["rows"] == 24
    assert "preference_accuracy" in of_pairs["metrics"]
    report = export(run.path, tmp_path / "merged")
    assert report["verified"]


def test_the_reference_of_a_run_that_starts_from_an_adapter_is_that_adapter(unpaired, make_recipe, tmp_path):
    first = train(make_recipe(output_dir=str(tmp_path / "sft")))
    second = train(unpaired(model={"adapter_name_or_path": str(first.path)}, output_dir=str(tmp_path / "kto")))
    assert next(one for one in records(second) if "loss" in one)["loss"] == pytest.approx(0.5, abs=0.02)


def test_data_says_what_is_wrong_with_the_verdicts(unpaired, capsys):
    rows = [row for row in ROWS if row["label"]] + [row for row in ROWS if not row["label"]][:3]
    rows += [{**ROWS[0], "label": False}]
    inspect_data(unpaired(rows=rows, data={"eval_fraction": 0.0}))
    said = capsys.readouterr()
    assert "12 good, 4 bad" in said.err
    assert "GOOD ANSWERS OUTWEIGH THE OTHERS: set kto.undesirable_weight=3 to make up" in said.err
    assert "1 answers are called GOOD AND BAD" in said.err
    inspect_data(unpaired({"undesirable_weight": 3.0}, rows=rows, data={"eval_fraction": 0.0}))
    assert "OUTWEIGH" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}},
            "and a step has one; set training",
        ),
        ({"dpo": {}}, "dpo and kto exclude each other"),
        ({"data": {"packing": True}}, "data.packing is for supervised training; leave it out with kto"),
        ({"lora": {"lora_dropout": 0.1}}, "kto compares the model with its reference, which has no dropout"),
    ],
)
def test_what_does_not_go_with_it_is_refused(unpaired, sections, said):
    with pytest.raises(InputError, match=said):
        unpaired(**sections)


def test_labels_of_a_file_are_read_as_in_training(unpaired, tmp_path):
    run = train(unpaired())
    results = []
    for name, said in (("words", str), ("numbers", int)):
        rows = [{**row, "label": said(row["label"])} for row in ROWS[:8]]
        results.append(evaluate(run.path, data_file=str(write_jsonl(tmp_path / f"{name}.jsonl", rows))))
    assert results[0]["rows"] == results[1]["rows"] == 4
    assert results[0]["metrics"] == results[1]["metrics"]


def test_answers_of_one_kind_are_refused(unpaired):
    recipe = unpaired(rows=[row for row in ROWS if row["label"]])
    with pytest.raises(InputError, match=r"every training row is a good answer; .* supervised training"):
        train(recipe)


def test_a_file_of_unpaired_rows_is_known_by_its_first_row(own_run, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    result = evaluate(own_run.path, data_file=str(path), max_rows=8)
    assert result["rows"] == 4
    assert "desirable_margin" in result["metrics"]


def test_the_learning_rate_is_that_of_the_objective(unpaired):
    recipe = unpaired()
    values = recipe.model_dump(mode="json", exclude_unset=True)
    del values["training"]["learning_rate"]
    assert Recipe.from_dict(values).training.learning_rate == 5e-6
