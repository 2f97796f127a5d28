"""Preference pairs go the whole way: recipe, reference, checkpoint and resume, evaluation, export."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora.commands.adapters import adapters
from qlora.commands.compare import compare_runs
from qlora.commands.data import inspect_data
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.report import report
from qlora.commands.served import compare_served
from qlora.commands.train import train
from qlora.jobs.opening.prepared_data import prepare
from qlora.jobs.reporting import findings
from qlora.recipe import Recipe
from qlora.runs.folder import RunDir
from qlora.system.errors import InputError, Interrupted, TrainingFailed
from qlora.training.reliable_trainer import Reliable
from tests.conftest import some_slow, write_jsonl

ROWS = [
    {
        "prompt": f"What is {a} plus {b}?",
        "chosen": f"{a} plus {b} is {a + b}.",
        "rejected": f"It is {a * b + 7}, I think.",
    }
    for a in range(6)
    for b in range(4)
]


@pytest.fixture
def pairs(make_recipe, tmp_path):
    """Return pairs(objective="dpo", **sections) -> a Recipe."""

    def pairs(objective="dpo", **sections):
        rows = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
        values = {
            objective: {"beta": 0.5} | sections.pop(objective, {}),
            "training": {"eval_steps": 2, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
            | sections.pop("training", {}),
            "data": {"train": str(rows)} | sections.pop("data", {}),
        }
        return make_recipe(**values, **sections)

    return pairs


def records(run):
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


def computed(run):
    measured = ("time", "tokens_per_second", "memory_bytes")
    return [{key: value for key, value in one.items() if key not in measured} for one in records(run)]


def weights(run):
    return load_file(run.adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_run_learns_to_prefer_and_its_evaluation_says_so(pairs, objective, capsys):
    recipe = pairs(objective, training={"max_steps": 8})
    run = train(recipe)
    steps = [one for one in records(run) if "loss" in one]
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]
    evaluations = [one for one in records(run) if "eval_loss" in one]
    assert evaluations[-1]["rewards/accuracies"] == 1.0
    assert "pairs     of 18 prompts" in capsys.readouterr().err
    if objective == "dpo":
        assert steps[0]["loss"] == pytest.approx(0.693, abs=0.02)  # the reference is the model as it begins
    assert run.reference_file.exists() == (objective == "dpo")
    result = evaluate(run.path)
    accuracy, margin = (result["metrics"][f"preference_{name}"] for name in ("accuracy", "margin"))
    assert accuracy["value"] == 1.0
    assert margin["low"] <= margin["value"] <= margin["high"]
    assert result["change"]["preference_margin"]["low"] > 0
    assert "preference accuracy" in capsys.readouterr().out
    assert evaluate(run.path, data_file=recipe.data.train[0].path)["metrics"]["preference_accuracy"]["value"] == 1.0


def stopped_after_4(recipe, monkeypatch):
    """Train until step 4, where a signal comes."""
    original = Reliable.end_step

    def end_step(self, control):
        if self.state.global_step == 4:
            self.saving.stop.number = 15
        original(self, control)

    monkeypatch.setattr(Reliable, "end_step", end_step)
    with pytest.raises(Interrupted, match="resume after step 4"):
        train(recipe)
    monkeypatch.setattr(Reliable, "end_step", original)


def whole_and_stopped(recipe_of, tmp_path, monkeypatch, together):
    """Return (a whole run, the recipe of one that was stopped after step 4)."""
    training = {"logging_steps": 3, "max_steps": 6, "tokens_per_micro_batch": together}
    whole = train(recipe_of(training=training, output_dir=str(tmp_path / "whole")))
    recipe = recipe_of(training=training, output_dir=str(tmp_path / "part"))
    stopped_after_4(recipe, monkeypatch)
    return whole, recipe


def assert_same(run, whole):
    assert computed(run) == computed(whole)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(run)[name]), name


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("together", some_slow(["auto", None], [None]))
def test_a_run_that_was_stopped_goes_on_to_the_bit(pairs, tmp_path, monkeypatch, together):
    whole, recipe = whole_and_stopped(pairs, tmp_path, monkeypatch, together)
    reference = RunDir(recipe.output_dir).reference_file
    before = reference.read_bytes()
    run = train(recipe, resume=True)
    assert reference.read_bytes() == before
    assert_same(run, whole)


@pytest.mark.usefixtures("unplanned")
def test_a_run_without_its_reference_does_not_go_on(pairs, tmp_path):
    run = train(pairs())
    longer = pairs(training={"max_steps": 6})
    reference = run.reference_file.read_bytes()
    for damage, why in ((None, "is missing"), (reference[:40], "is damaged")):
        run.reference_file.unlink()
        if damage is not None:
            run.reference_file.write_bytes(damage)
        with pytest.raises(InputError, match=f"reference.safetensors {why}, and the model .* start a new run"):
            train(longer, resume=True)
        run.reference_file.write_bytes(reference)
    train(longer, resume=True)


@pytest.mark.usefixtures("unplanned")
def test_the_reference_of_a_run_that_starts_from_an_adapter_is_that_adapter(pairs, make_recipe, tmp_path):
    first = train(make_recipe(output_dir=str(tmp_path / "sft")))
    start = {"model": {"adapter_name_or_path": str(first.path)}, "output_dir": str(tmp_path / "dpo")}
    second = train(pairs(**start))
    assert next(one for one in records(second) if "loss" in one)["loss"] == pytest.approx(0.693, abs=0.02)
    found = load_file(second.reference_file)["train"]
    from qlora.data import Answers
    from qlora.evaluation import metrics
    from qlora.jobs.opening.opened_model import open_subject

    rows = prepare(Recipe.load(second.recipe_file)).examples
    subject = open_subject(first.path)
    expected = [[-metrics.losses(subject.model, Answers(rows[:4], which))[n][0] for which in (0, 1)] for n in range(4)]
    torch.testing.assert_close(found[:4], torch.tensor(expected), rtol=0.02, atol=0.1)
    with subject.model.disable_adapter():
        base = metrics.losses(subject.model, Answers(rows[:4]))
    assert abs(found[0, 0] + base[0][0]) > 1


@pytest.mark.usefixtures("unplanned")
def test_an_export_is_proven_on_the_chosen_answers_and_reports_know_the_run(pairs, tmp_path, capsys):
    run = train(pairs())
    export([run.path], tmp_path / "model")
    assert json.loads((tmp_path / "model" / "export_report.json").read_text())["verified"]
    assert "\n    dpo:\n      beta: 0.5\n" in (tmp_path / "model" / "README.md").read_text()
    others = write_jsonl(tmp_path / "others.jsonl", ROWS[:3])
    export([run.path], tmp_path / "proven-on-others", data=str(others))
    proof = json.loads((tmp_path / "proven-on-others" / "export_report.json").read_text())
    assert (proof["verified"], proof["rows"]["from"]) == (True, "rows of others.jsonl")
    served = compare_served(run.path, data=str(others), forms=["trained"])
    assert (served["rows"], served["forms"][0]["message"]) == (3, None)
    evaluate(run.path)
    found = report([run.path], tmp_path / "page.html")
    assert "preference accuracy" in json.dumps(found)
    capsys.readouterr()
    [listed] = adapters(str(tmp_path))
    assert str(run.path) in json.dumps(listed)
    shown = " ".join(capsys.readouterr().out.split())
    margin = listed["metrics"]["preference_margin"]["value"]
    assert f"preference margin {margin:.4f} (" in shown  # nats, not a share
    assert "preference accuracy 100% (" in shown


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("together", some_slow(["auto", None], [None]))
def test_a_step_is_the_same_however_its_pairs_are_split(pairs, tmp_path, together):
    steps = []
    for rows, micro_batches in ((4, 1), (2, 2), (1, 4)):
        training = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches, "max_steps": 2}
        recipe = pairs(
            training=training | {"tokens_per_micro_batch": together, "optim": "adamw_torch", "learning_rate": 1e-3},
            model={"dtype": "float32"},
            quantization=None,
            output_dir=str(tmp_path / f"run{rows}"),
        )
        steps.append([one for one in records(train(recipe)) if "loss" in one])
    for others in steps[1:]:
        for one, other in zip(steps[0], others, strict=True):
            for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
                assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


def test_data_shows_both_answers(pairs, capsys):
    report = inspect_data(pairs())
    shown = capsys.readouterr().out
    assert "chosen:\n" in shown
    assert "[[0 plus 0 is 0.<|im_end|>]]" in shown
    assert "[[It is 7, I think.<|im_end|>]]" in shown
    assert report["preference"]["chosen_longer"] < 0.5


def test_rows_for_supervised_training_are_refused(pairs, make_recipe, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(InputError, match="neither chosen nor rejected, only prompt, completion: a row for supervised"):
        prepare(pairs(data={"train": str(rows)}))
    pairs()
    with pytest.raises(InputError, match=r"a preference pair, for DPO; .* Set dpo=\{\}"):
        prepare(make_recipe(data={"train": str(tmp_path / "pairs.jsonl")}))


def test_chosen_answers_that_are_much_longer_are_said(pairs, tmp_path, capsys):
    rows = [{**row, "chosen": " ".join([row["chosen"]] * 5)} for row in ROWS]
    inspect_data(pairs(data={"train": str(write_jsonl(tmp_path / "long.jsonl", rows))}))
    assert "CHOSEN ANSWERS ARE MUCH LONGER" in capsys.readouterr().err


def test_pairs_that_contradict_each_other_are_said(pairs, tmp_path, capsys):
    rows = [*ROWS, *({**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS[:2])]
    section = {"train": str(write_jsonl(tmp_path / "swapped.jsonl", rows)), "eval_fraction": 0.0}
    recipe, expected = pairs(data=section), "4 rows say the same as another row with CHOSEN AND REJECTED SWAPPED"
    found = inspect_data(recipe, html=tmp_path / "data.html")
    assert found["preference"]["contradictory"] == 4
    assert expected in capsys.readouterr().err
    run = train(recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 1})}))
    report([run.path], tmp_path / "report.html")
    for page in ("data.html", "report.html"):
        assert f'<p class="warn">{expected}.</p>' in (tmp_path / page).read_text()
    capsys.readouterr()
    assert inspect_data(pairs())["preference"]["contradictory"] == 0
    assert "SWAPPED" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("unplanned")
def test_an_adapter_that_was_trained_with_dropout_goes_on_without(pairs, make_recipe, tmp_path):
    first = train(make_recipe(lora={"lora_dropout": 0.1, "use_dora": True}, output_dir=str(tmp_path / "sft")))
    recipe = pairs(model={"adapter_name_or_path": str(first.path)}, output_dir=str(tmp_path / "dpo"))
    run = train(recipe)
    assert next(one for one in records(run) if "loss" in one)["loss"] == pytest.approx(0.693, abs=0.02)
    assert Recipe.load(run.recipe_file).lora.lora_dropout == 0.0
    assert evaluate(run.path)["metrics"]["preference_accuracy"]["value"] == 1.0
    found = report([run.path], tmp_path / "page.html")
    assert f'"Before" is the base, without {first.path}' in found["runs"][0]["verdicts"][0]["words"]
    with pytest.raises(InputError, match=r"sft: not evaluated on .*pairs\.jsonl yet; run:  qlora eval .*sft --data"):
        compare_runs(first.path, run.path, str(tmp_path / "pairs.jsonl"))
    for one in (first, run):
        evaluate(one.path, data_file=str(tmp_path / "pairs.jsonl"))
    change = compare_runs(first.path, run.path, str(tmp_path / "pairs.jsonl"))["change"]
    assert change["preference_margin"]["low"] > 0


@pytest.mark.usefixtures("unplanned")
def test_a_run_does_not_go_on_with_rows_that_are_cut_otherwise(pairs, tmp_path):
    rows = [{**row, "rejected": row["rejected"] * 8} for row in ROWS]
    data = {"train": str(write_jsonl(tmp_path / "long.jsonl", rows)), "overlong": "truncate"}
    train(pairs(data=data | {"max_length": 100}))
    longer = pairs(data=data | {"max_length": 110}, training={"max_steps": 6})
    with pytest.raises(InputError, match=r"reference.safetensors is of other rows \(train\)"):
        train(longer, resume=True, allow_change=("data.max_length", "rows"))


def test_the_watch_judges_the_loss_of_the_chosen_answers(pairs, monkeypatch):
    """Not that of DPO, which goes to 0 where both answers get unlikely, and of ipo is no number of nats."""
    from qlora.training.divergence import Watch

    seen, original = [], Watch.take
    monkeypatch.setattr(Watch, "take", lambda self, step, loss: seen.append(loss) or original(self, step, loss))
    recipe = pairs(
        dpo={"beta": 0.5, "loss_type": "ipo"}, training={"logging_steps": 1, "per_device_train_batch_size": 3}
    )
    run = train(recipe)
    (count,) = {sum(label >= 0 for label in one.chosen.labels) for one in prepare(recipe).examples}
    steps = [one for one in records(run) if "loss" in one]
    assert seen == pytest.approx([-one["logps/chosen"] / count for one in steps], rel=1e-6)
    assert abs(steps[0]["loss"] - seen[0]) > 1


@pytest.mark.usefixtures("unplanned")
def test_a_training_that_makes_the_chosen_answers_unlikely_is_ended_and_says_why(pairs, capsys):
    """Its loss falls all the while: that of apo_down is to make both answers less likely, the rejected one more so."""
    settings = {"max_steps": 80, "watchdog_steps": 8, "logging_steps": 1, "learning_rate": 0.05, "warmup_ratio": 0.5}
    recipe = pairs(dpo={"loss_type": "apo_down"}, training=settings | {"eval_steps": None})
    with pytest.raises(TrainingFailed, match="the loss of the chosen answers has diverged: the median of the last 8"):
        train(recipe)
    run = RunDir(recipe.output_dir)
    assert [one.name for one in findings.of_run(run)] == ["chosen answers get unlikely too"]
    assert (
        "why       chosen answers get unlikely too: the log probability of a chosen answer fell"
        in capsys.readouterr().err
    )


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize(
    ("rate", "both_ways", "expected"),
    some_slow(
        [(1e-8, False, "the learning rate is too low"), (1e-2, True, "no preference is learned"), (1e-2, False, None)],
        but=[(1e-2, True, "no preference is learned")],
    ),
)
def test_rewards_that_say_that_nothing_is_learned(pairs, capsys, rate, both_ways, expected):
    settings = {"max_steps": 24, "logging_steps": 1, "learning_rate": rate, "eval_steps": None, "save_steps": None}
    recipe = pairs(training=settings, data={"eval_fraction": 0.0})
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS] if both_ways else []
    write_jsonl(Path(recipe.data.train[0].path), [*ROWS, *swapped])
    run = train(recipe)
    said = [line.split(": ")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("why")]
    assert said == ([f"why       {expected}"] if expected else [])
    assert [one.name for one in findings.of_run(run)] == ([expected] if expected else [])
