"""Metrics of libraries and questions with choices, from a run and from a model alone."""

import json

import pytest

import qlora
from qlora import cli
from qlora.commands.eval import evaluate
from qlora.commands.train import train
from qlora.data.sources import File
from qlora.evaluation import answer_metrics, intervals
from qlora.evaluation.asked import Asked
from qlora.system.errors import InputError, ProofFailed
from tests.conftest import write_jsonl

QUESTIONS = [
    {"question": f"What is {a} plus {b}?", "choices": [str(a + b), str(a), "many of them"], "answer": (a + b) % 3}
    for a in range(4)
    for b in range(3)
]


@pytest.fixture
def questions(tmp_path):
    return write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_choices_are_scored_before_and_after_into_evals(own_run, questions, tmp_path):
    own = evaluate(own_run.path)
    found = evaluate(own_run.path, choices=str(questions), by_text=True, require=["acc>=0", "acc_norm<=1"])
    assert found["rows"] == 12
    assert found["loss"] != found["before"]["loss"]
    assert set(found["change"]) == {"loss", "perplexity", "bits_per_byte", "acc", "acc_norm"}
    acc = found["metrics"]["acc"]
    assert found["change"]["acc"]["value"] == acc["value"] - found["before"]["metrics"]["acc"]["value"]
    assert acc["low"] < acc["value"] < acc["high"]
    name = f"questions-{File(str(questions), None).digest()[:8]}-choices-by-text"
    assert json.loads((own_run.evals / f"{name}.json").read_text()) == found
    assert json.loads(own_run.eval_file.read_text()) == own  # never taken for the run's own score
    rows = lines_of(own_run.evals / f"{name}-answers.jsonl")
    assert rows[0]["prompt"] == "Question: What is 0 plus 0?\nAnswer:"
    assert rows[0]["choices"] == ["0", "0", "many of them"]
    for when, score in (("before", found["before"]), ("after", found)):
        right = [row[when]["answer"] == row["expected"] for row in rows if len({*row["choices"]}) == 3]
        counted = [bool(row[when]["acc"][0]) for row in rows if len({*row["choices"]}) == 3]
        assert right == counted
        assert sum(row[when]["acc"][0] for row in rows) / 12 == pytest.approx(score["metrics"]["acc"]["value"])
    assert found["data"]["command"] == f"qlora eval {own_run.path} --choices {questions} --by-text"
    with pytest.raises(
        InputError, match=r"--shots 2: there are no training rows with `question`, .* give --examples FILE"
    ):
        evaluate(own_run.path, choices=str(questions), shots=2)
    shown = evaluate(own_run.path, choices=str(questions), shots=2, examples=str(questions), chat=True, max_rows=3)
    assert shown["data"]["rows"] == 3
    assert (shown["data"]["rows_in_all"], shown["data"]["shots"]) == (12, 2)
    [kept] = own_run.evals.glob("*-2-shots-chat-3-rows-answers.jsonl")
    assert [one["role"] for one in lines_of(kept)[0]["prompt"]] == ["user", "assistant"] * 2 + ["user"]


def test_examples_are_the_runs_own_training_rows_where_they_have_choices(make_recipe, unplanned, questions, tmp_path):
    columns = {"prompt": "{{ question }}", "completion": "{{ choices[answer] }}"}
    run = train(make_recipe(data={"train": str(questions), "columns": columns, "eval_fraction": 0.0}))
    asked = write_jsonl(tmp_path / "asked.jsonl", QUESTIONS[:1])
    found = evaluate(run.path, choices=str(asked), shots=1)
    [row] = lines_of(next(run.evals.glob("asked-*-1-shots-answers.jsonl")))
    assert row["prompt"].startswith(
        "What is 0 plus 1?\nA. 1\n"
    )  # not the question itself, which is the first row there
    assert found["data"]["examples"] == [{"path": str(questions), "sha256": File(str(questions), None).digest()}]


def test_a_model_alone_is_scored_and_its_answers_are_kept_where_asked(tiny_model, questions, tmp_path):
    answers = tmp_path / "answers.jsonl"
    with pytest.raises(ProofFailed, match=r"acc is 0\.\d+, required is >= 1"):
        evaluate(tiny_model("llama"), choices=str(questions), answers=str(answers), require=["acc>=1"])
    rows = lines_of(answers)
    assert len(rows) == 12
    assert {"prompt", "choices", "expected", "after"} == rows[0].keys()


def test_the_command_line_asks_the_same(monkeypatch):
    asked = {}
    monkeypatch.setattr(qlora, "evaluate", lambda *args, **more: asked.update(more) or {}, raising=False)
    words = ["--lm-eval", "a, b", "--shots", "5", "--chat", "--include-path", "t", "--batch-size", "2"]
    cli.app(["eval", "runs/x", *words], standalone_mode=False)
    expected = Asked(tasks=["a", "b"], shots=5, chat=True, include_path="t", batch_size=2)
    assert Asked(**asked | {"metrics": (), "require": ()}) == expected
    cli.app(["eval", "x", "--choices", "f", "--by-text", "--shots", "1", "--examples", "g"], standalone_mode=False)
    assert Asked(**asked) == Asked(choices="f", by_text=True, shots=1, examples="g", tasks=[])
    with pytest.raises(InputError, match="--lm-eval: name a task"):
        cli.app(["eval", "runs/x", "--lm-eval", ","], standalone_mode=False)


def test_bad_questions_are_refused_and_nothing_is_written(tiny_model, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [QUESTIONS[0], QUESTIONS[1] | {"answer": "Z"}])
    with pytest.raises(InputError, match=r"a\.jsonl has 1 problem\n  line 2: answer: 'Z'"):
        evaluate(tiny_model("llama"), choices=str(file), answers=str(tmp_path / "answers.jsonl"))
    assert not (tmp_path / "answers.jsonl").exists()


def test_metrics_of_libraries_are_measured_row_by_row_with_intervals(own_run, tmp_path, monkeypatch):
    for module in ("sacrebleu", "rouge_score"):
        pytest.importorskip(module, reason="the extra `eval` is not installed")
    monkeypatch.setattr(intervals, "RESAMPLES", 100)  # 2,000 are 5 s
    names = ["rougeL", "bleu", "chrf"]
    found = evaluate(own_run.path, metrics=names, require=["rougeL<=1"])
    rows = lines_of(own_run.answers_file)
    for name in names:
        metric = answer_metrics.named(name, ())
        for when, score in (("before", found["before"]), ("after", found)):
            parts = [answer_metrics.from_json(row[when][name]) for row in rows]
            again = [metric.row(row[when]["answer"], row["expected"]) for row in rows]
            assert [part.tolist() for part in parts] == [list(part) for part in again]
            value = score["metrics"][name]
            assert value["value"] == pytest.approx(metric.value(sum(parts)))
            assert value["low"] <= value["value"] <= value["high"]
        assert found["change"][name]["value"] == pytest.approx(
            found["metrics"][name]["value"] - found["before"]["metrics"][name]["value"]
        )
    assert found["metrics"]["chrf"]["value"] > 0
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "Some words."}])
    with pytest.raises(InputError, match="--metric is for answers, and the rows are plain text"):
        evaluate(own_run.path, text, metrics=["rougeL"])
