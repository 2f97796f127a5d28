"""qlora compare: every training a run folder of its own, whatever becomes of it; one table; the same after an interruption."""

import csv
import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from qlora import cli
from qlora.commands.adapters import adapters
from qlora.commands.compare import compare, compare_runs
from qlora.commands.eval import evaluate
from qlora.evaluation import answer_metrics
from qlora.jobs.comparing import compared_runs, comparison_table
from qlora.jobs.comparing.compared_runs import Folder
from qlora.jobs.evaluating import eval_rows
from qlora.recipe import as_yaml
from qlora.recipe.comparison import Comparison, entries
from qlora.runs.folder import RunDir
from qlora.system.errors import InputError, Interrupted, QLoRAError
from tests.conftest import write_jsonl


@pytest.fixture
def comparison(make_recipe, tmp_path):
    """Return make(**fields) -> the path of a comparison whose base trains a tiny model for two steps."""

    def make(**fields):
        base = tmp_path / "base.yaml"
        base.write_text(make_recipe(output_dir="unused").to_yaml())
        values = {
            "base": str(base),
            "variants": {"lora": None},
            "output_dir": str(tmp_path / "compared"),
            "forgetting": None,
        }
        path = tmp_path / "comparison.yaml"
        path.write_text(as_yaml(values | fields))
        return path

    return make


@pytest.fixture
def in_process(monkeypatch):
    """Train and evaluate in this process, 10 s less each; yields the commands. One test has processes of their own."""
    commands = []

    def launch(arguments, log):
        commands.append(arguments)
        try:
            cli.app(arguments, standalone_mode=False)
        except QLoRAError as error:
            return error.exit_code, str(error)
        except Interrupted as stopped:
            return stopped.exit_code, ""
        return 0, ""

    monkeypatch.setattr(compared_runs, "launch", launch)
    return commands


def without_times(found):
    """Return a comparison without what differs from one time to the next."""
    moving = {"seconds", "latency_seconds", "peak_bytes", "merged_latency_seconds"}
    text = json.dumps(found, default=str)
    kept = json.loads(text, object_hook=lambda one: {key: value for key, value in one.items() if key not in moving})
    return kept | {"notes": [line for line in found["notes"] if not line.startswith("Merged")]}


DIVERGES = {"learning_rate": 30.0, "max_steps": 40, "warmup_ratio": 0.3, "watchdog_steps": 8, "logging_steps": 1}
VARIANTS = {
    "lora": {"sweep": {"training.learning_rate": [1e-2]}},
    "slow": {"ia3": {}, "sweep": {"training.learning_rate": [1e-4]}},
    "diverging": {"training": DIVERGES, "sweep": {}},
    "large": {"memory.budget": "1MB", "sweep": {"training.learning_rate": [1e-3]}},
}


@pytest.mark.slow
def test_all_of_a_comparison_is_one_table_and_an_interruption_changes_nothing(
    comparison, in_process, tmp_path, monkeypatch
):
    path = comparison(variants=VARIANTS, seeds=[1, 2], max_rows=5)
    whole = compare(path, [f"output_dir={tmp_path}/whole"])
    rows = {Path(row["run"]).name: row for row in whole["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "lora-learning_rate-0.01-seed-1": "done",
        "lora-learning_rate-0.01-seed-2": "done",
        "slow-learning_rate-0.0001-seed-1": "done",
        "slow-learning_rate-0.0001-seed-2": "done",
        "diverging-seed-1": "diverged",
        "diverging-seed-2": "diverged",
        "large-learning_rate-0.001-seed-1": "does not fit",
        "large-learning_rate-0.001-seed-2": "does not fit",
    }
    assert "does not fit: " in rows["large-learning_rate-0.001-seed-1"]["message"]
    assert "the loss has diverged: the median" in rows["diverging-seed-1"]["message"]
    one = rows["lora-learning_rate-0.01-seed-2"]
    assert one["metrics"]["exact_match"]["value"] == 0
    assert one["trainable_parameters"] == 8192
    assert one["saved_bytes"] > 2 * 8192
    assert min(one["seconds"], one["peak_bytes"], one["latency_seconds"], one["loss"]) > 0
    first, second = whole["summary"]
    assert (first["variant"], first["best"], first["seeds"], first["chosen"]) == ("lora", True, 2, True)
    assert (second["variant"], second["best"]) == ("slow", False)
    assert first["mean"] == pytest.approx(
        sum(rows[f"lora-learning_rate-0.01-seed-{seed}"]["loss"] for seed in (1, 2)) / 2
    )
    assert second["behind"]["low"] > 0

    _look_at_files(tmp_path / "whole", whole)

    # one of them once more: ended before the second training, and again before it is evaluated
    path = comparison(variants={"lora": VARIANTS["lora"]}, seeds=[1, 2], max_rows=5)
    counts = {"train": 0, "eval": 0}
    real = compared_runs.launch

    def ended(arguments, log):
        counts[arguments[0]] += 1
        if counts[arguments[0]] == {"train": 2, "eval": 2}[arguments[0]]:
            return 128 + signal.SIGTERM, ""
        return real(arguments, log)

    monkeypatch.setattr(compared_runs, "launch", ended)
    again = [f"output_dir={tmp_path}/ended"]
    for resume in (False, True):
        with pytest.raises(Interrupted) as stopped:
            compare(path, again, resume)
        assert (
            str(stopped.value)
            == f"stopped; what is there is kept; go on with:  qlora compare {path} {again[0]} --resume"
        )
    found = compare(path, again, resume=True)
    expected = json.loads(json.dumps(without_times(whole)).replace("/whole/", "/ended/"))
    assert without_times(found)["rows"] == expected["rows"][:2]
    assert [one["mean"] for one in found["summary"]] == [first["mean"]]
    assert json.loads((tmp_path / "ended" / "comparison.json").read_text()) == found


def _look_at_files(folder, found):
    table = list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))
    assert [row["variant"] for row in table] == [row["variant"] for row in found["rows"]]
    assert float(table[0]["loss"]) == found["rows"][0]["loss"]
    text = (folder / "comparison.md").read_text()
    assert found["command"] in text
    assert len(re.findall(r"^\| (lora|slow) \|", text, re.MULTILINE)) == 2
    assert "| large | learning_rate 0.001 seed 1 | does not fit |" in text
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert {Path(one["path"]).name for one in adapters(folder)} >= {
        "lora-learning_rate-0.01-seed-1",
        "slow-learning_rate-0.0001-seed-2",
    }


def test_a_command_is_a_process_whose_end_and_words_are_known(tmp_path):
    log = tmp_path / "log.txt"
    assert compared_runs.launch(["plan", "--help"], log)[0] == 0
    assert compared_runs.launch(["plan"], log) == (2, "qlora plan needs a recipe: qlora plan RECIPE; see recipes/")
    assert "Say what training will cost" in log.read_text()
    assert log.read_text().endswith("qlora: qlora plan needs a recipe: qlora plan RECIPE; see recipes/\n")


def test_what_ends_a_process_is_a_row_and_not_the_end_of_the_comparison(comparison, in_process, tmp_path, monkeypatch):
    """kill -9, which the system's own lack of memory is too."""
    path = comparison(variants={"killed": {"training.max_steps": 3}, "lora": None}, forgetting="built-in")
    real = compared_runs.launch
    monkeypatch.setattr(
        compared_runs, "launch", lambda arguments, log: (-9, "") if "killed" in str(arguments) else real(arguments, log)
    )
    killed, lora = (found := compare(path))["rows"]
    assert (killed["status"], killed["message"]) == ("failed", "ended by signal 9: the system ran out of memory?")
    assert lora["status"] == "done"
    assert lora["forgetting"] != 0
    assert found["merged_latency_seconds"] > 0
    assert [command[0] for command in in_process] == ["train", "eval"]
    by_bits = comparison_table.of_folder(Folder(Comparison.load(path, ["metric=bits_per_byte"])), path)
    assert by_bits["lower_is_better"]
    assert by_bits["summary"][0]["mean"] == pytest.approx(lora["bits_per_byte"])
    assert lora["bits_per_byte"] > 1


def test_the_metric_that_decides_is_measured(comparison, monkeypatch):
    for module in ("sacrebleu", "rouge_score"):
        pytest.importorskip(module, reason="the extra `eval` is not installed")
    commands = []
    monkeypatch.setattr(compared_runs, "launch", lambda arguments, log: commands.append(arguments) or (0, ""))
    folder = Folder(Comparison.load(comparison(metric="rougeL", metrics=["bleu", "exact_match"])))
    compared_runs.train_one(folder, folder.entries[0])
    assert [command[0] for command in commands] == ["train", "eval"]
    assert commands[1][2:] == ["--latency", "--metric", "bleu", "--metric", "rougeL"]


@pytest.mark.parametrize("wrong", [{"metric": "rougeX"}, {"metrics": ["blue"]}, {"extract": "(a"}])
def test_a_metric_that_there_is_not_is_refused_before_anything_is_trained(comparison, in_process, wrong):
    with pytest.raises(InputError, match=r"there is no metric '(rougeX|blue)'; there are|not a regular expression"):
        compare(comparison(**wrong))
    assert in_process == []


def test_a_variant_names_another_method_and_the_bases_leaves(comparison):
    path = comparison(
        variants={
            "full": {"full": {}, "quantization": None},
            "nested": {"training": {"learning_rate": 0.5}, "lora": {"r": 2}},
            "dotted": {"lora.use_dora": True},
        }
    )
    by_name = {entry.name: entry.recipe for entry in entries(Comparison.load(path))}
    assert by_name["full"].lora is None
    assert by_name["full"].full is not None
    assert (by_name["nested"].training.learning_rate, by_name["nested"].lora.r, by_name["nested"].lora.lora_alpha) == (
        0.5,
        2,
        8,
    )
    assert (by_name["dotted"].lora.use_dora, by_name["dotted"].lora.r) == (True, 4)
    assert by_name["nested"].training.max_steps == 2  # of the base, beside what the variant changes


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"variant": {}}, r"comparison\.yaml has 1 problem.*line \d+  variant: unknown field; did you mean variants\?"),
        ({"variants": {}}, "variants: .* at least 1 item"),
        ({"variants": {"a/b": None}}, "variants.a/b: a name of letters, digits"),
        ({"variants": {"x": {"sweep": {"training.seed": 3}}}}, r"variants\.x\.sweep: should be fields with lists of values"),
        ({"variants": {"x": {"lora.rank": 4}}},
         r"comparison\.yaml, variant x of \S*base\.yaml, has 1 problem\s+line \d+  lora\.rank: unknown field; did"),
        ({"variants": {"x": {"lora": {"r": "no"}}}}, r"line \d+  lora\.r: should be .*, found 'no'"),
        ({"variants": {"x": {"full": {}}}}, "variant x of .*full trains the weights themselves"),
        ({"sweep": {"training.learning_rate": ["fast"]}}, r"variant lora of .*line \d+  training\.learning_rate: .*found 'fast'"),
        ({"sweep": {"training.learning_rate": []}}, r"sweep\.training\.learning_rate: should be a list of values"),
        ({"seeds": [1, 1]}, "seeds: one of them is listed twice"),
        ({"variants": {"x": {"after": "y"}, "y": {}}}, r"variants\.x\.after: should be a variant above it.*; there is none"),
        ({"variants": {"y": {}, "x": {"after": ["y"]}}}, r"variants\.x\.after: should be a variant above it.*: y"),
        ({"variants": {"y": {"sweep": {"lora.r": [1, 2]}}, "x": {"after": "y"}}}, "y is trained with several settings; give"),
        ({"variants": {"x": {}, "y": {"data.eval_fraction": 0.5}}}, "x and y hold out different rows .* set data: FILE"),
        ({"variants": {"x": {}, "y": {"orpo": {}}}}, "x and y hold out different rows"),
        ({"metric": "preference_accuracy"}, "preference_accuracy is measured on pairs, and the evaluated rows are not pairs"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"base": "nowhere.yaml"}, "no recipe at nowhere.yaml"),
        ({"variants": {"logs": {}}}, r"line \d+  variants\.logs: output_dir has a file or folder of that name; rename"),
        ({"variants": {"Comparison.json": {}}}, r"variants\.Comparison\.json: output_dir has a file or folder"),
        ({"variants": {"a": {}, "A": {}}}, "two trainings would be called A; rename"),
        ({"variants": {"x": {"output_dir": "y"}}}, r"line \d+  variants\.x: output_dir has no effect, because the folder"),
        ({"sweep": {"output_dir": ["y", "z"]}}, "output_dir has no effect"),
        ({"sweep": {"training.seed": [1]}, "seeds": [2]}, r"variants\.lora: training\.seed has no effect, because seeds has"),
        ({"variants": {"x": {"training": {"seed": 7}}}, "seeds": [2]}, r"variants\.x: training\.seed has no effect"),
        ({"variants": {"x": {}, "y": {"after": "x", "model.adapter_name_or_path": "z"}}}, "it starts from x; leave it out"),
        ({"variants": {"x": {"lora.r": 2}}, "sweep": {"lora.r": [4, 8]}}, r"variants\.x: sets lora\.r, which its sweep sets too"),
        ({"variants": {"x": {"lora.r": 2}}, "sweep": {"lora": [{"r": 4}, {"r": 8}]}}, r"sets lora\.r, which its sweep"),
        ({"variants": {"x": {"lora": {"r": 2}}}, "sweep": {"lora": [None]}}, r"x: sets lora, which its sweep sets too"),
        ({"sweep": {"lora": [{"r": 4}], "lora.r": [8]}}, r"variants\.lora: its sweep sets lora\.r twice; keep one"),
        ({"sweep": {"training": [{"seed": 1}]}, "seeds": [2]}, r"lora: training\.seed has no effect, because"),
        ({"variants": {"x": {"lora.r": 2, "lora": {"r": 4}}}}, r"variants\.x: sets lora\.r twice; keep one"),
        ({"variants": {"x": {"lora": None, "lora.r": 4}}}, r"variants\.x: sets lora\.r twice; keep one"),
        ({"sweep": {f"lora.{name}": list(range(1, 60)) for name in ("r", "lora_alpha", "x", "y", "z", "t")}},
         r"the comparison has 42,180,533,641 trainings, every value of a sweep with every other, more than 1,000; take"),
        ({"variants": {"x" * 60: {}}, "sweep": {f"model.{'n' * 60}": ["y" * 80], "data.train": ["z" * 80]}},
         r"a training would be called x+-n+\.\.\., \d+ characters, more than 200; shorten"),
        ({"sweep": {"training.learning_rate": [1e-3, 0.001]}}, "two trainings would be called lora-learning_rate-0.001"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_comparison_is_said_before_anything_is_trained(comparison, fields, said, tmp_path):
    with pytest.raises(InputError, match=f"(?s){said}"):
        compare(comparison(**fields))
    assert not (tmp_path / "compared").exists()


def test_a_comparison_is_not_written_over_another_and_goes_on_only_as_it_was(comparison, in_process, tmp_path):
    path = comparison()
    with pytest.raises(InputError, match="holds no comparison to resume; leave out --resume"):
        compare(path, resume=True)
    planned = compare(path, dry_run=True)["planned"]
    assert [(one["name"], one["fits"]) for one in planned] == [("lora", True)]
    assert planned[0]["peak_bytes"] > 0
    assert not (tmp_path / "compared").exists()
    first = compare(path)
    with pytest.raises(InputError, match="holds a comparison; go on with it by --resume"):
        compare(path)
    num_commands = len(in_process)
    written = tmp_path / "compared" / "recipes" / "lora.yaml"
    spelled = written.read_text().replace("learning_rate: 0.01\n", "learning_rate: 1e-2 # the same\n")
    assert spelled != written.read_text()
    written.write_text(spelled)
    assert without_times(compare(path, resume=True)) == without_times(first)
    assert len(in_process) == num_commands  # nothing is trained again
    with pytest.raises(
        InputError, match=r"lora was trained with another recipe .*compared/recipes/lora\.yaml\); change it back"
    ):
        compare(comparison(variants={"lora": {"lora.r": 2}}), resume=True)
    more = compare(comparison(variants={"lora": None, "ia3": {"ia3": {}}}), resume=True)  # a variant more is welcome
    assert [row["status"] for row in more["rows"]] == ["done", "done"]
    folder = tmp_path / "compared"
    assert json.loads((folder / "comparison.json").read_text()) == more
    assert not [one for one in more["notes"] if one.startswith("The trainings differ")]
    file = folder / "ia3" / "environment.json"
    kept = file.read_text()
    there = json.loads(kept)
    file.write_text(json.dumps(there | {"versions": there["versions"] | {"torch": "2.0"}}))
    notes = compare(comparison(variants={"lora": None, "ia3": {"ia3": {}}}), resume=True)["notes"]
    assert [one for one in notes if one.startswith("The trainings differ in torch too")]
    file.write_text(kept)
    losses = {row["variant"]: row["loss"] for row in more["rows"]}
    table = csv.DictReader((folder / "comparison.csv").read_text().splitlines())
    assert {row["variant"]: float(row["loss"]) for row in table} == losses
    assert [one["variant"] for one in more["summary"]] == sorted(losses, key=losses.get)
    assert more["command"] in (folder / "comparison.md").read_text()


@pytest.fixture
def pairs(tmp_path):
    rows = [
        {
            "prompt": f"What is {a} plus {b}?",
            "chosen": f"{a} plus {b} is {a + b}.",
            "rejected": f"{a} plus {b} is {a + b + 1}.",
        }
        for a in range(6)
        for b in range(4)
    ]
    return str(write_jsonl(tmp_path / "pairs.jsonl", rows))


def test_a_variant_goes_on_from_what_another_has_trained(comparison, pairs):
    path = comparison(
        variants={
            "sft": {"lora.r": 2, "training.max_steps": 3, "sweep": {}},
            "dpo": {"after": "sft", "dpo": {"beta": 0.2}, "data.train": pairs},
            "orpo": {"after": "dpo", "orpo": {}, "sweep": {}},
        },
        sweep={"training.learning_rate": [1e-4]},
        seeds=[1, 2],
        data=pairs,
    )
    folder = Folder(Comparison.load(path))
    by_name = {entry.name: entry for entry in folder.entries}
    sft, dpo = by_name["sft-seed-2"], by_name["dpo-learning_rate-0.0001-seed-2"]
    assert (sft.after, dpo.after) == (None, "sft-seed-2")
    assert dpo.recipe.model.adapter_name_or_path == sft.recipe.output_dir
    assert (dpo.recipe.lora, dpo.recipe.training.max_steps) == (sft.recipe.lora, 3)
    assert dpo.recipe.training.learning_rate == 1e-4
    assert (sft.recipe.training.learning_rate, sft.recipe.objective) == (1e-2, None)
    orpo = by_name["orpo-seed-1"]
    assert orpo.after == "dpo-learning_rate-0.0001-seed-1"
    assert (orpo.recipe.dpo, orpo.recipe.objective.key, orpo.recipe.data.train[0].path) == (None, "orpo", pairs)


@pytest.mark.slow
def test_trainings_with_other_objectives_are_compared_on_the_same_pairs(comparison, in_process, pairs, tmp_path):
    path = comparison(
        variants={
            "sft": None,
            "sft-dpo": {"after": "sft", "dpo": {}, "data.train": pairs, "training.learning_rate": 1e-3},
            "orpo": {"orpo": {}, "data.train": pairs},
        },
        data=pairs,
        max_rows=6,
        metric="preference_accuracy",
        metrics=["exact_match"],
    )
    found = compare(path)
    assert [row["status"] for row in found["rows"]] == ["done"] * 3
    folder = tmp_path / "compared"
    first = next(iter(RunDir(folder / "sft-dpo").metrics_file.read_text().splitlines()))
    assert json.loads(first)["loss"] == pytest.approx(0.693, abs=0.02)  # its reference is what sft has trained
    for one in found["summary"]:
        row = next(row for row in found["rows"] if row["variant"] == one["variant"])
        assert one["mean"] == row["metrics"]["preference_accuracy"]["value"]
        assert one["metrics"]["exact_match"] == row["metrics"]["exact_match"]["value"]
    table = (folder / "comparison.md").read_text()
    assert "| preference accuracy | 95 % | exact match |" in table
    assert without_times(compare(path, resume=True)) == without_times(found)
    assert len(in_process) == 6


def test_what_would_start_from_a_training_that_failed_is_a_row_that_says_so(comparison, in_process, monkeypatch):
    path = comparison(variants={"first": None, "second": {"after": "first"}})
    monkeypatch.setattr(compared_runs, "launch", lambda arguments, log: (1, "no disk"))
    first, second = compare(path)["rows"]
    assert (first["status"], first["message"]) == ("failed", "no disk")
    assert (second["status"], second["message"]) == ("failed", "it starts from first, which did not end well")


def test_what_was_measured_in_another_way_is_measured_again(comparison, in_process, tmp_path, capsys):
    path, run = comparison(extract=r"(\d+)"), tmp_path / "compared" / "lora"
    compare(path)
    other = shutil.copytree(run, tmp_path / "other")
    for overrides in (["extract=(.)"], ["extract=(.)", "metric=rougeL", "forgetting=built-in"]):
        before = len(in_process)
        (row,) = compare(path, overrides, resume=True)["rows"]
        assert [arguments[0] for arguments in in_process[before:]] == ["eval"]
    scores = RunDir(run).scores()
    assert (row["forgetting"], scores["forgetting"]["data"]) == (scores["forgetting"]["value"], "built-in")
    assert row["metrics"]["rougeL"] == scores["metrics"]["rougeL"]
    assert scores["data"]["extract"] == "(.)"
    capsys.readouterr()
    assert list(compare_runs(other, run)["change"]) == ["loss", "bits_per_byte"]
    assert r"answers were cut by --extract '(\\d+)' and '(.)': no change of what" in capsys.readouterr().err


def test_as_many_rows_as_usual_are_the_runs_own_score(comparison, in_process):
    assert compare(comparison(max_rows=100))["rows"][0]["status"] == "done"


@pytest.mark.slow
def test_classes_are_compared_by_accuracy(classify_recipe, in_process, tmp_path):
    base, path = tmp_path / "base.yaml", tmp_path / "comparison.yaml"
    base.write_text(classify_recipe("bert").to_yaml())
    values = {"base": str(base), "variants": {"lora": {}, "ia3": {"ia3": {}}}, "metric": "accuracy"}
    path.write_text(as_yaml(values | {"output_dir": str(tmp_path / "compared")}))
    found = compare(path)
    assert [row["status"] for row in found["rows"]] == ["done", "done"]
    for one, row in zip(found["summary"], found["rows"], strict=True):
        accuracy = row["metrics"]["accuracy"]
        assert one["mean"] == accuracy["value"]
        assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
        assert row["forgetting"] is row["latency_seconds"] is row["perplexity"] is None
    assert found["merged_latency_seconds"] is None
    assert compare(path, ["metric=macro_f1"], resume=True)["summary"][0]["mean"] == pytest.approx(
        found["rows"][0]["metrics"]["macro_f1"]["value"]
    )


@pytest.mark.slow
def test_two_runs_side_by_side(comparison, in_process, tmp_path, capsys, monkeypatch):
    compare(comparison(variants={"lora": None, "wide": {"lora.r": 8, "training.max_steps": 6}}))
    one, other = tmp_path / "compared" / "lora", tmp_path / "compared" / "wide"
    capsys.readouterr()
    found = compare_runs(one, other)
    assert found["differences"] == {
        "recipe": [["lora.r", 4, 8], ["training.max_steps", 2, 6]],
        "data": [],
        "versions": [],
        "base model": [],
    }
    change = found["change"]["loss"]
    assert change["value"] == pytest.approx(found["rows"][1]["loss"] - found["rows"][0]["loss"])
    assert change["low"] < change["value"] < change["high"] < 0
    shown = capsys.readouterr().out
    assert "lora.r" in shown
    assert "training time" in shown
    bits = "{:+.4f}".format(found["change"]["bits_per_byte"]["value"])
    assert re.search(rf"bits per byte .* {re.escape(bits)} ", shown)

    def not_installed(name, references):
        raise InputError(f"{name}: an extra is not installed")

    monkeypatch.setattr(answer_metrics, "named", not_installed)  # measured on another machine
    assert list(compare_runs(one, other)["change"]) == ["loss", "bits_per_byte"]
    assert "no change of exact_match: exact_match: an extra is not installed" in capsys.readouterr().err
    with pytest.raises(InputError, match="no run at"):
        compare_runs(one, tmp_path / "nothing")


def test_two_runs_are_compared_on_as_many_rows_as_both_were_evaluated_on(own_run, tmp_path, capsys):
    other = RunDir(shutil.copytree(own_run.path, tmp_path / "other"))
    for run, counts in ((own_run, (1, 2)), (other, (2, 3))):
        for count in counts:
            evaluate(run.path, max_rows=count)
    evaluate(own_run.path)  # alone: the other has no score of all its rows
    shutil.rmtree(own_run.evals)
    capsys.readouterr()
    assert compare_runs(own_run.path, other.path)["change"] == {}
    assert f"{other.path}: evaluated only on the first 3 of these rows; run:  qlora eval" in capsys.readouterr().err
    evaluate(own_run.path, max_rows=2)
    capsys.readouterr()
    found = compare_runs(own_run.path, other.path)
    loss = own_run.scores("held-out-2-rows")["loss"]
    assert loss != own_run.scores()["loss"]
    assert [row["loss"] for row in found["rows"]] == [loss, loss]
    assert found["change"]["loss"]["value"] == 0
    assert "evals/held-out-2-rows.json" in capsys.readouterr().err
    evaluate(other.path)
    assert compare_runs(own_run.path, other.path)["rows"][1]["loss"] == own_run.scores()["loss"]


def test_what_unicode_calls_a_line_end_ends_no_line_of_the_answers(own_run, tmp_path):
    words = "a\u2028b\u2029c\u0085d"
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"{n} {words}", "completion": words} for n in range(3)])
    score, name = evaluate(own_run.path, rows), eval_rows.name_of_file(rows, "text-generation")
    kept = own_run.score_files(name)[1]
    lines = kept.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3  # to a reader that ends lines there
    raw = "".join(json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in lines)
    assert words in raw  # else nothing is tested
    kept.write_text(raw, encoding="utf-8")
    found = compared_runs.measured(own_run, name)
    assert [one["prompt"][-1]["content"] for one, _ in found.rows] == [f"{n} {words}" for n in range(3)]
    assert [expected for _, expected in found.rows] == [words] * 3
    assert len(found.answers) == score["rows"] == 3
    assert compare_runs(own_run.path, own_run.path, rows)["change"]["loss"]["value"] == 0


def test_a_damaged_peak_of_memory_is_no_missing_one(own_run):
    assert compared_runs.row_of(own_run)["peak_bytes"] > 0
    own_run.memory_file.write_text("{")
    with pytest.raises(InputError, match=r"memory\.json"):
        compared_runs.row_of(own_run)
    own_run.memory_file.unlink()
    assert compared_runs.row_of(own_run)["peak_bytes"] is None
