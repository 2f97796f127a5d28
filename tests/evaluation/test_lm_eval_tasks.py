"""lm-eval on the model in memory, and our own likelihoods against it on the same rows."""

import importlib.util
import json

import numpy as np
import pytest

from qlora.commands.eval import evaluate
from qlora.commands.train import train
from qlora.data import multiple_choice
from qlora.evaluation import choices, likelihood, lm_eval_tasks
from qlora.evaluation.asked import Asked
from qlora.jobs.opening.opened_model import open_subject
from qlora.system.errors import InputError, ProofFailed
from qlora.terminal import evaluation
from tests.conftest import write_jsonl

THERE = importlib.util.find_spec("lm_eval") is not None

# prompts as in lm-eval's mmlu and mmlu_continuation
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/test.jsonl", dev: "{folder}/dev.jsonl"}}}}
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
description: "The following are {kind} (with answers) about sums.\\n\\n"
doc_to_text: "{text}"
doc_to_choice: {choices}
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean}}, {{metric: acc_norm, aggregation: mean}}]
"""
LETTERS = {
    "name": "own_letters",
    "kind": "multiple choice questions",
    "text": "{{question.strip()}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nAnswer:",
    "choices": '["A", "B", "C"]',
}
TEXTS = {
    "name": "own_texts",
    "kind": "questions",
    "text": "Question: {{question.strip()}}\\nAnswer:",
    "choices": '"{{choices}}"',
}
GENERATED = """
task: own_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/test.jsonl"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean}}, {{metric: bleu, aggregation: bleu}}]
"""


def rows(numbers):
    return [
        {"question": f"What is {a} plus {b}?", "choices": [str(a + b), f"{a} or {b} apples", "no"], "answer": (a + b) % 3,
         "subject": "sums"}
        for a in numbers for b in (1, 2, 3)
    ]  # fmt: skip


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Return a folder of three tasks of the same rows, which are all that lm-eval has: it reads its own 14,000 files in 30 s."""
    own = {"include_defaults": False}
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda tasks, path: tasks.TaskManager(include_path=path, **own))
    write_jsonl(tmp_path / "test.jsonl", rows(range(4)))
    write_jsonl(tmp_path / "dev.jsonl", rows(range(10, 12)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for one in (LETTERS, TEXTS):
        (folder / f"{one['name']}.yaml").write_text(TASK.format(folder=tmp_path, **one))
    (folder / "own_words.yaml").write_text(GENERATED.format(folder=tmp_path))
    return folder


# slow: it brings 30 packages, and is imported in 10 s
lm_eval = pytest.mark.skipif(not THERE, reason="the extra `lm-eval` is not installed")


@lm_eval
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_likelihoods_and_scores_are_lm_evals_on_the_same_rows(tasks, tmp_path, tiny_model):
    subject = open_subject(tiny_model("llama"))
    subject.model.float()
    all_questions, examples = (multiple_choice.read(tmp_path / name) for name in ("test.jsonl", "dev.jsonl"))
    names = tuple(f"own_{kind}" for kind in ("letters", "texts"))
    for shots in (0, 5):
        asked = Asked(tasks=names, include_path=str(tasks), shots=shots, batch_size=4)
        theirs = lm_eval_tasks.score(subject.model, subject.tokenizer, asked)
        for name in names:
            questions = [choices.ask(one, examples, shots, by_text=name == "own_texts") for one in all_questions]
            samples = theirs.samples[name]
            assert [one.text for one in questions] == [sample["arguments"][0][0] for sample in samples]
            pairs = [pair for one in questions for pair in one.tokens(subject.tokenizer, chat=False)]
            ours = likelihood.log_likelihoods(subject.model, pairs, 5)
            values = [one[0] for sample in samples for one in sample["filtered_resps"]]
            assert ours == pytest.approx(values, abs=1e-4)  # float32, other batches
            assert np.std(ours) > 0.1
            found = choices.score(subject.model, subject.tokenizer, questions, chat=False, batch_size=5)
            for metric in ("acc", "acc_norm"):
                number = theirs.numbers[f"{name}.{metric}"]
                assert found.to_json()["metrics"][metric]["value"] == number.value
                assert (number.parts_N2 == found.parts[metric]).all()


@lm_eval
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_is_measured_before_and_after_and_stays_as_it_was(tasks, make_recipe, unplanned):
    run = train(make_recipe())
    own = evaluate(run.path)
    asked = {"tasks": ["own_letters", "own_words"], "include_path": str(tasks), "require": ["own_letters.acc>=0"]}
    found = evaluate(run.path, max_rows=9, **asked)
    assert {"own_letters.acc", "own_letters.acc_norm", "own_words.exact_match", "own_words.bleu"} <= found[
        "metrics"
    ].keys()
    assert found["rows"] == 18
    acc, change = found["metrics"]["own_letters.acc"], found["change"]["own_letters.acc"]
    assert 0 <= acc["low"] <= acc["value"] <= acc["high"] <= 1
    assert change["value"] == pytest.approx(acc["value"] - found["before"]["metrics"]["own_letters.acc"]["value"])
    place = run.evals / "lm-eval-own_letters+own_words-9-rows.json"
    assert json.loads(place.read_text())["metrics"] == found["metrics"]
    lines = [json.loads(line) for line in (run.evals / f"{place.stem}-answers.jsonl").read_text().splitlines()]
    assert len(lines) == 18
    assert {one["task"] for one in lines} == {"own_letters", "own_words"}
    assert any(one["before"]["answer"] != one["after"]["answer"] for one in lines)
    assert lines[0]["expected"] == "B"  # of 0 plus 1
    assert evaluate(run.path)["loss"] == own["loss"]


@lm_eval
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_lm_eval_refuses_is_said_in_one_message(tasks, tiny_model, tmp_path):
    with pytest.raises(InputError, match="--lm-eval nothing_like_it: lm-eval has no such task"):
        evaluate(tiny_model("llama"), tasks=["nothing_like_it"], include_path=str(tasks))
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(InputError, match=r"--lm-eval own_letters: .*most tasks download their rows"):
        evaluate(tiny_model("llama"), tasks=["own_letters"], include_path=str(tasks))


@pytest.mark.skipif(THERE, reason="lm-eval is installed")
def test_without_lm_eval_its_extra_is_named():
    with pytest.raises(InputError, match=r"pip install 'lm.eval[<>=.,\d]+'"):
        lm_eval_tasks.refuse_missing()


def sample(row, metric, **more):
    of = {"doc_id": row, "filter": "none", "target": 1, "metrics": ["acc"], "acc": metric}
    return (
        of
        | {"arguments": [("Q:", " A"), ("Q:", " B")], "filtered_resps": [(-1.0, True), (-2.0 + metric * 2, False)]}
        | more
    )


def scores(values):
    samples = {"t": [sample(row, value) for row, value in enumerate(values)]}
    results = {
        "t": {
            "alias": "t",
            "acc,none": np.mean(values),
            "acc_stderr,none": 0.1,
            "ppl,none": 30.0,
            "ppl_stderr,none": "N/A",
        }
    }
    return lm_eval_tasks.TaskScores(lm_eval_tasks._numbers({"results": results, "samples": samples}), samples)


def test_names_of_tasks_are_shown_as_they_can_be_required():
    metrics = {"own_words.ppl": {"value": 30.0, "low": None, "high": None}}
    result = {"rows": 1, "data": {"tasks": ["own_words"]}, "metrics": metrics}
    assert evaluation._row("own_words.ppl", result) == ["own_words.ppl", "30.0000", ""]
    with pytest.raises(ProofFailed, match=r"own_words\.ppl is 30\.0000, required is < 20"):
        Asked(tasks=["own_words"], require=["own_words.ppl<20"]).check(result)


def test_rows_of_lm_eval_are_paired():
    before, after = scores([0.0] * 10), scores([1.0] * 9 + [0.0])
    assert after.to_json()["metrics"]["t.ppl"] == {"value": 30.0, "low": None, "high": None}
    acc = after.to_json()["metrics"]["t.acc"]
    assert (acc["value"], round(acc["low"], 3), round(acc["high"], 3)) == (0.9, 0.596, 0.982)  # Wilson
    change = after.since(before)["t.acc"]
    assert change["value"] == pytest.approx(0.9)
    assert 0.4 < change["low"] < 0.9 < change["high"] <= 1  # of ten pairs
    assert after.since(before)["t.ppl"] == {"value": 0.0, "low": None, "high": None}
    assert after.num_rows == 10
    first = after.rows(before)[0]
    assert first == {
        "task": "t", "row": 0, "prompt": "Q:", "expected": "B",
        "before": {"answer": "A", "acc": 0.0}, "after": {"answer": "B", "acc": 1.0},
    }  # fmt: skip
