"""Tables that other programs open: pandas finds numbers, nothing where nothing was measured, and each text as it was."""

import io
import json

import pandas
import pytest

from qlora.jobs.comparing.compared_runs import NUMBERS
from qlora.pages import comparison, served
from qlora.system.storage import add_line, json_line

TEXT = 'Grüße, "Welt" | 很好 🙂'


def row(variant, **values):
    found = {
        "variant": variant,
        "settings": {"training.learning_rate": 1e-5},
        "seed": 1,
        "status": "done",
        "message": None,
    }
    return found | {"run": f"runs/{variant}", "metrics": {}} | dict.fromkeys(NUMBERS) | values


def test_a_comparison_is_a_table_of_numbers_and_texts():
    measured = {"exact_match": {"value": 0.25, "low": 0.1, "high": 0.4}}
    rows = [row("lora", loss=1e-7, seconds=2.5, peak_bytes=2**33, trainable_parameters=8192, metrics=measured)]
    rows += [row(TEXT, status="failed", message=f"{TEXT}\nsecond\r\nthird"), row("dora", loss=3.0, peak_bytes=2**30)]
    table = pandas.read_csv(io.StringIO(comparison.as_csv({"rows": rows})))
    assert list(table["variant"]) == ["lora", TEXT, "dora"]
    assert list(table["run"]) == ["runs/lora", f"runs/{TEXT}", "runs/dora"]
    assert table["message"].fillna("").tolist() == ["", f"{TEXT} second\r third", ""]
    assert table["loss"].dtype == table["peak_bytes"].dtype == table["exact_match"].dtype == float
    assert table["loss"].fillna(-1).tolist() == [1e-7, -1, 3.0]
    assert table["peak_bytes"].fillna(-1).tolist() == [2.0**33, -1, 2.0**30]
    assert table["exact_match"].isna().tolist() == [False, True, True]
    assert table["seed"].dtype == int
    assert table["forgetting"].isna().all()
    assert table["settings"].tolist() == ["learning_rate 1e-05"] * 3


def test_the_forms_of_a_served_run_are_one_too():
    form = dict.fromkeys(("bytes", "tokens_per_second", "first_token_seconds", "loss", "kl", "message"))
    forms = [form | {"name": "f16", "what": TEXT, "bytes": 2**31, "kl": 1.7e-6}]
    forms += [form | {"name": "q4", "what": "a, b", "message": "no quantizer"}]
    table = pandas.read_csv(io.StringIO(served.as_csv({"forms": forms})))
    assert table["what"].tolist() == [TEXT, "a, b"]
    assert table["kl"].fillna(-1).tolist() == [1.7e-6, -1]
    assert table["bytes"].fillna(-1).tolist() == [2**31, -1]
    assert table["message"].fillna("").tolist() == ["", "no quantizer"]


def test_a_line_is_one_line_to_every_reader(tmp_path):
    answers = [TEXT, "two\nlines\r\n", "\u2028 and \x85", "007", ""]
    for answer in answers:
        add_line(tmp_path / "answers.jsonl", {"answer": answer, "loss": [1.5, 2.0]})
    text = (tmp_path / "answers.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["answer"] for line in text.splitlines()] == answers
    table = pandas.read_json(tmp_path / "answers.jsonl", lines=True, dtype=False)
    assert table["answer"].tolist() == answers
    assert TEXT.replace('"', '\\"') in text  # other letters stay readable
    assert json_line({"answer": "\ud800"}) == '{"answer": "\\ud800"}\n'
    with pytest.raises(ValueError, match="JSON"):
        json_line({"loss": float("nan")})
