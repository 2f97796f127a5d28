"""What a score is measured on: the rows that the run held out, or others that are named as such."""

import errno
import json
import math
import os

import pytest

from qlora.commands.adapters import adapters
from qlora.commands.eval import evaluate
from qlora.commands.train import train
from qlora.data.sources import File
from qlora.evaluation import generate
from qlora.evaluation.asked import Asked
from qlora.jobs.comparing import compared_runs
from qlora.jobs.evaluating import eval_rows
from qlora.jobs.exporting import run_facts
from qlora.jobs.exporting.push_files import files_to_push
from qlora.jobs.reporting import reported
from qlora.jobs.talking import votes
from qlora.runs.folder import RunDir
from qlora.system.errors import InputError, ProofFailed
from qlora.system.files import lines_of
from tests.conftest import messages, write_jsonl


def appended(path, *turns):
    with open(path, "a", encoding="utf-8") as file:
        for question, answer in turns:
            file.write(json.dumps({"messages": messages([("user", question), ("assistant", answer)])}) + "\n")


def test_rows_that_are_added_later_change_no_score(make_recipe, tmp_path):
    """A new draw over the longer file would measure on rows that were trained on."""
    run = train(make_recipe())
    before = evaluate(run.path)
    assert before["data"]["rows"] == before["rows"] == 6
    appended(tmp_path / "train.jsonl", ("Something new?", "Yes."), ("And more?", "Even more."))
    after = evaluate(run.path)
    assert {k: v for k, v in after.items() if k != "data"} == {k: v for k, v in before.items() if k != "data"}
    [then], [now] = before["data"]["files"], after["data"]["files"]
    assert then["path"] == now["path"]
    assert then["sha256"] != now["sha256"] == File(now["path"], None).digest()


def test_rows_that_are_gone_are_missed_and_not_replaced(make_recipe, tmp_path):
    run = train(make_recipe())
    evaluate(run.path)
    score = run.eval_file.read_bytes()
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(InputError, match=r"of the 6 held-out rows of .*run are no longer in .*train\.jsonl"):
        evaluate(run.path)
    assert run.eval_file.read_bytes() == score


def test_a_changed_file_of_held_out_rows_is_told_apart(make_recipe, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    appended(held_out, ("One?", "Uno."), ("Two?", "Duo."))
    run = train(make_recipe(data={"eval": str(held_out), "eval_fraction": 0.0}))
    before = evaluate(run.path)
    appended(held_out, ("Three?", "Tre."))
    assert evaluate(run.path)["loss"] == before["loss"]  # the run's own rows are all there
    held_out.write_text(held_out.read_text().replace("Uno", "Unus"))
    with pytest.raises(InputError, match=r"1 of the 2 held-out rows of .* no longer in .*held_out\.jsonl"):
        evaluate(run.path)


def test_other_rows_never_become_the_runs_own_score(own_run, tmp_path):
    own = evaluate(own_run.path)
    stem = "other rows " + "\u884c" * 70  # 221 bytes, which a name may have, but not with more behind it
    other = tmp_path / f"{stem}.jsonl"
    write_jsonl(other, [{"messages": messages([("user", "Hm?"), ("assistant", "No.")])}])
    found = evaluate(own_run.path, other)
    few = evaluate(own_run.path, max_rows=2)
    assert json.loads(own_run.eval_file.read_text()) == own
    digest = File(str(other), None).digest()
    expected = {f"{stem[:40]}-{digest[:8]}": found, "held-out-2-rows": few}
    assert {path.name for path in own_run.evals.iterdir()} == {
        name + end for name in expected for end in (".json", "-answers.jsonl")
    }
    assert {name: json.loads((own_run.evals / f"{name}.json").read_text()) for name in expected} == expected
    assert found["data"]["held_out"] is False
    assert found["data"]["files"] == [{"path": str(other), "sha256": digest}]
    assert found["data"]["command"] == f"qlora eval {own_run.path} --data '{other}'"
    assert few["data"] | {"rows_in_all": 6, "rows": 2, "held_out": True} == few["data"]
    [listed] = [entry for entry in adapters(tmp_path) if entry["path"] == str(own_run.path)]
    assert listed["metrics"] == own["metrics"]


def test_the_score_on_a_folder_is_named_after_all_its_files(own_run, tmp_path):
    folder = tmp_path / "asked"
    folder.mkdir()
    for name in ("a", "b"):
        write_jsonl(folder / f"{name}.jsonl", [{"messages": messages([("user", f"{name}?"), ("assistant", "No.")])}])

    def name():
        evaluate(own_run.path, folder)
        [found] = {path.stem for path in own_run.evals.iterdir() if not path.stem.endswith("-answers")} - names
        assert eval_rows.name_of_file(folder, "text-generation") == found
        return found

    names = set()
    names.add(name())
    appended(folder / "b.jsonl", ("More?", "Yes."))  # not the first: the rows are others all the same
    names.add(name())
    assert all(one.startswith("asked-") for one in names)


@pytest.mark.parametrize("verb", [evaluate, RunDir.open])
def test_a_recipe_in_place_of_its_run_is_told_from_a_model(make_recipe, own_run, tmp_path, verb):
    file = tmp_path / "mine.yaml"
    file.write_text(make_recipe(output_dir=str(own_run.path)).to_yaml())
    with pytest.raises(InputError, match=f"mine.yaml is a recipe; name the folder of its run: {own_run.path}"):
        verb(file)
    file.write_text(make_recipe(output_dir="runs/later").to_yaml())
    with pytest.raises(InputError, match=r"was not trained yet: qlora train .*mine.yaml, then name its run runs/later"):
        verb(file)
    file.write_text("rows: 3")
    with pytest.raises(InputError, match=r"mine\.yaml(: is a file; give the model folder| is not a run folder)"):
        verb(file)


@pytest.mark.parametrize("verb", [reported.gather, lambda targets: files_to_push(targets[0], "me/it")])
def test_report_and_push_know_a_recipe_too(make_recipe, own_run, tmp_path, verb):
    file = tmp_path / "mine.yaml"
    file.write_text(make_recipe(output_dir=str(own_run.path)).to_yaml())
    with pytest.raises(InputError, match=f"is a recipe; name the folder of its run: {own_run.path}"):
        verb([file])


def test_every_answer_is_kept_beside_the_score_with_what_it_counts(own_run):
    result = evaluate(own_run.path)
    rows = [json.loads(line) for line in own_run.answers_file.read_text().splitlines()]
    assert len(rows) == result["rows"] == 6
    for row in rows:
        [question] = row["prompt"]
        assert question["role"] == "user"
        assert row["expected"].startswith(question["content"][8:].split(" plus")[0])
        assert row["after"]["exact_match"] == [float(row["after"]["answer"].strip() == row["expected"]), 1.0]
    for name, score in (("before", result["before"]), ("after", result)):
        nats, tokens = map(sum, zip(*(row[name]["loss"] for row in rows), strict=True))
        assert score["loss"] == pytest.approx(nats / tokens, rel=1e-12)
        assert score["tokens"] == tokens
        low, high = score["loss_interval"]
        assert low < score["loss"] < high
    change = result["change"]["loss"]
    assert change["value"] == pytest.approx(result["loss"] - result["before"]["loss"])
    assert change["low"] < change["value"] < change["high"]
    assert set(result["change"]) == {"loss", "perplexity", "bits_per_byte", "exact_match"}
    bits = result["loss"] * result["tokens"] / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / sum(len(row["expected"].encode()) for row in rows))
    for name in ("perplexity", "bits_per_byte"):
        low, high = result[f"{name}_interval"]
        assert low < result[name] < high
        assert result["change"][name]["value"] == pytest.approx(result[name] - result["before"][name])


def test_a_gate_fails_with_both_numbers_after_the_score_is_written(own_run):
    met = evaluate(own_run.path, require=["loss>0", "exact_match<=1"], max_forgetting=100.0)
    own_run.eval_file.unlink()
    with pytest.raises(ProofFailed) as failed:
        evaluate(own_run.path, require=["loss > 100", "exact_match>=0.9", "perplexity>1"], max_forgetting=100)
    assert str(failed.value).splitlines() == [
        "the evaluation does not meet what is required:",
        f"  loss is {met['loss']:.4f}, required is > 100",
        "  exact_match is 0.0000, required is >= 0.9",
    ]
    assert failed.value.exit_code == 4
    assert json.loads(own_run.eval_file.read_text())["loss"] == met["loss"]


def test_forgetting_is_the_rise_of_the_loss_on_other_text(own_run, tmp_path):
    own = write_jsonl(tmp_path / "general.jsonl", [{"text": f"Some words about the number {n}."} for n in range(5)])
    found = evaluate(own_run.path, forgetting=str(own), latency=True)
    forgotten = found["forgetting"]
    assert forgotten["value"] == forgotten["after"] - forgotten["before"] != 0
    assert forgotten["low"] <= forgotten["value"] <= forgotten["high"]
    assert forgotten["data"] == str(own)
    assert evaluate(own_run.path, own)["loss"] == pytest.approx(
        forgotten["after"], rel=1e-6
    )  # the same rows, the same loss
    assert 0 < found["latency"]["token"] < 10
    assert 0 < found["latency"]["first_token"] < 10
    assert evaluate(own_run.path, forgetting="built-in")["forgetting"]["tokens"] > 1000


def test_a_base_that_another_run_has_asked_is_not_asked_again(own_run, make_recipe, tmp_path, monkeypatch):
    other = train(make_recipe(training={"learning_rate": 5e-3}, output_dir=str(tmp_path / "other")))
    measured = evaluate(own_run.path, metrics=["rougeL"], extract=r"\w+")
    evaluate(other.path)
    rounds = []
    answer = generate.answers

    def answers(*args, **kwargs):
        rounds.append(kwargs["what"])
        return answer(*args, **kwargs)

    monkeypatch.setattr(generate, "answers", answers)
    taken = evaluate(own_run.path, metrics=["rougeL"], extract=r"\w+", before_of=str(other.path))
    assert rounds == ["answering"]
    assert taken["data"]["extract"] == r"\w+"
    assert {k: v for k, v in taken.items() if k != "data"} == {k: v for k, v in measured.items() if k != "data"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        pytest.param({"data": {"seed": 5}}, "was evaluated on other rows", marks=pytest.mark.slow),
        ({"data": {"train_on": "last_assistant"}}, "another data.train_on or data.thoughts than"),
        pytest.param(
            {"quantization": None, "model": {"dtype": "bfloat16"}},
            "another base model than that of",
            marks=pytest.mark.slow,
        ),
        ({"quantization": {"compute_dtype": "float16"}}, "another quantization than that of"),
    ],
)
def test_what_another_run_has_of_another_base_or_other_rows_is_refused(changed, said, own_run, make_recipe, tmp_path):
    other = train(make_recipe(**changed, output_dir=str(tmp_path / "other")))
    with pytest.raises(InputError, match=r"other: not evaluated yet|than that of"):
        evaluate(own_run.path, before_of=str(other.path))
    evaluate(other.path)
    with pytest.raises(InputError, match=rf"--before-of .*other: {said}.*; leave it out"):
        evaluate(own_run.path, before_of=str(other.path))


def test_what_a_model_by_itself_has_forgotten_is_not_made_up(make_recipe, tmp_path, tiny_model):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages([("user", "Hm?"), ("assistant", "No.")])}])
    with pytest.raises(InputError, match="--max-forgetting is for a run: a model by itself has no loss before"):
        evaluate(tiny_model("llama"), rows, max_forgetting=0.05)
    assert evaluate(tiny_model("llama"), rows, forgetting=str(rows))["forgetting"].keys() == {"after", "tokens", "data"}


def test_a_part_of_the_answers_is_compared(make_recipe, tmp_path, monkeypatch):
    rows = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"messages": messages([("user", f"{n}?"), ("assistant", f"It is #### {n}")])} for n in range(3)],
    )
    run = train(make_recipe())
    monkeypatch.setattr(generate, "answers", lambda *args, **kwargs: ["so #### 0", "#### 7 #### 1", "2"])
    assert evaluate(run.path, rows)["metrics"]["exact_match"]["value"] == 0
    for extract in (r"####\s*(\d+)", "{{ answer.split('####')[1:] | last }}"):
        result = evaluate(run.path, rows, extract=extract, metrics=["macro_f1"])
        assert result["metrics"]["exact_match"]["value"] == pytest.approx(2 / 3)
        assert result["metrics"]["macro_f1"]["value"] == pytest.approx(2 / 3)
    # the first answers have nothing there: it is as if a regular expression had found nothing
    found = evaluate(run.path, rows, extract="{{ answer.split('####')[1].strip() }}")
    assert found["metrics"]["exact_match"]["value"] == pytest.approx(1 / 3)
    with pytest.raises(InputError, match=r"--extract 'nowhere' finds nothing in any of the 3 expected answers"):
        evaluate(run.path, rows, extract="nowhere")


def test_a_score_of_parts_of_answers_is_told_from_one_of_whole_answers(own_run, capsys):
    for extract, said in (("[a-z]", ", cut by --extract '[a-z]'"), (None, "")):
        evaluate(own_run.path, extract=extract)
        card = [what for what, *_ in run_facts.origin_of(own_run).measured if what.startswith("exact match")]
        assert card == [f"exact match on 6 rows (qlora eval){said}"]
        verdict = reported.gather([own_run.path])["runs"][0]["verdicts"][0]
        assert ("--extract" in verdict["words"]) == bool(said)
        capsys.readouterr()
        assert adapters(own_run.path)[0]["extract"] == extract
        assert ("%), cut by --extract '[a-z]'" in capsys.readouterr().out) == bool(said)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"require": ["loss<nan"]}, "--require 'loss<nan' is not of the form NAME>=NUMBER"),
        ({"require": ["exact_match=0.8"]}, "--require 'exact_match=0.8' is not of the form NAME>=NUMBER"),
        ({"require": ["loss<many"]}, "--require 'loss<many' is not of the form"),
        ({"extract": "(a"}, r"--extract '\(a': not a regular expression"),
        ({"extract": "(a)(b)"}, "has 2 groups; one says what to compare"),
        ({"extract": "{{ answer"}, "not a Jinja template of `answer`"),
        ({"extract": "{{ ''.__class__.__mro__ }}"}, "not a Jinja template of `answer`"),
        ({"extract": "{{ anwser.split() | last }}"}, "there is only `answer`, no anwser"),
        ({"extract": "{% if answer %}{{ answer }}"}, "not a Jinja template of `answer`"),
        ({"metrics": ["bleurt"]}, "no metric 'bleurt'"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"max_forgetting": float("nan")}, "max_forgetting nan"),
        ({"answers": "no such folder/a.jsonl"}, "--answers no such folder/a.jsonl: there is no folder no such folder"),
        ({"answers": "."}, "--answers .: is a folder; name a file in it"),
        ({"answers": __file__}, r"test_eval\.py: is there and was not written by qlora eval; choose another name"),
        (
            {"answers": "./a.jsonl", "data_file": "a.jsonl"},
            r"--answers ./a\.jsonl: would overwrite the rows that are read",
        ),
        ({"shots": 5}, "--shots is for --choices FILE or --lm-eval TASK"),
        ({"by_text": True}, "--by-text is for --choices FILE"),
        ({"choices": "a.csv", "shots": -1}, "shots -1: at least 0"),
        ({"choices": "a.csv", "examples": "b.csv"}, "--examples FILE: give --shots too"),
        ({"choices": "a.csv", "tasks": ["mmlu"]}, "--choices and --lm-eval are scores of their own"),
        (
            {"choices": "a.csv", "metrics": ["macro_f1"]},
            "--metric is for answers to rows of your own; .*with --choices",
        ),
        ({"tasks": ["mmlu"], "latency": True}, "--latency is for answers to rows of your own; .*with --lm-eval"),
        ({"choices": "a.csv", "data_file": "b.jsonl"}, "--data is for rows of your own"),
    ],
)
def test_what_is_asked_wrongly_is_refused_before_anything_is_loaded(asked, said):
    with pytest.raises(InputError, match=said):
        evaluate("there is no such run", **asked)


@pytest.mark.parametrize(
    "asked", [{"batch_size": 2}, {"metrics": ["macro_f1"]}, {"choices": "a.csv"}, {"latency": True}]
)
def test_what_only_answers_in_words_have_is_refused_of_classes(asked):
    with pytest.raises(InputError, match="is for answers in words, and this model answers with classes"):
        Asked(**asked).refuse_for(has_classes=True, is_run=True)
    Asked(**asked).refuse_for(has_classes=False, is_run=True)


def test_a_requirement_of_what_was_not_measured_is_refused(own_run):
    with pytest.raises(
        InputError, match=r"--require json_fields: not measured on these rows; there are loss, perplexity, "
    ):
        evaluate(own_run.path, require=["json_fields>0.5"])


def test_scores_of_older_versions_are_read(own_run, tmp_path):
    """They have a metric as a number, without an interval."""
    result = evaluate(own_run.path)
    old = result | {"metrics": {"exact_match": 0.25}, "before": result["before"] | {"metrics": {"exact_match": 0.0}}}
    own_run.eval_file.write_text(json.dumps(old))
    assert own_run.scores()["metrics"] == {"exact_match": {"value": 0.25, "low": None, "high": None}}
    [listed] = [entry for entry in adapters(tmp_path) if entry["path"] == str(own_run.path)]
    assert listed["metrics"]["exact_match"]["value"] == 0.25
    assert ["exact match on 6 rows (qlora eval)", "0.0%", "25.0%"] in run_facts.origin_of(own_run).measured


def test_answers_with_separators_of_lines_are_read_back(own_run, tmp_path):
    """U+2028 and U+0085 end a line for str.splitlines, not for JSON Lines: a small model says such things."""
    evaluate(own_run.path)
    rows = [json.loads(line) for line in lines_of(own_run.answers_file)]
    rows[0]["after"]["answer"] = said = "one\u2028two\x85three"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    own_run.answers_file.write_text(text, encoding="utf-8")
    assert compared_runs.measured(own_run).answers == [row["after"]["answer"] for row in rows]
    kept = votes.Votes(tmp_path / "votes.jsonl", {"file": "1"})
    kept.add({"prompt": said}, votes.BASE, {votes.BASE: said, votes.TUNED: said}, "left")
    assert votes.read(tmp_path / "votes.jsonl") == kept.given


@pytest.mark.parametrize("checkpoint", ["", "checkpoints/step-2"])
def test_a_run_that_cannot_keep_its_score_is_refused_before_a_weight_is_read(own_run, monkeypatch, checkpoint):
    def no(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", no)
    monkeypatch.setattr("qlora.commands.eval.open_subject", lambda *args: pytest.fail("it was loaded"))
    with pytest.raises(InputError, match=f"{own_run.path}: Read-only file system; .* copy the run folder"):
        evaluate(own_run.path / checkpoint)
