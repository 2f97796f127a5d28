"""What a score is measured on: the rows that the run held out, or others that are named as such."""

import json

import pytest

from qlora.commands.adapters import adapters
from qlora.commands.eval import evaluate
from qlora.commands.train import train
from qlora.data.sources import File
from qlora.system.errors import InputError
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


def test_other_rows_never_become_the_runs_own_score(make_recipe, tmp_path):
    run = train(make_recipe())
    own = evaluate(run.path)
    other = tmp_path / "other rows.jsonl"
    write_jsonl(other, [{"messages": messages([("user", "Hm?"), ("assistant", "No.")])}])
    found = evaluate(run.path, other)
    few = evaluate(run.path, max_rows=2)
    assert json.loads(run.eval_file.read_text()) == own
    written = {path.name: json.loads(path.read_text()) for path in run.evals.iterdir()}
    digest = File(str(other), None).digest()
    assert written == {f"other rows-{digest[:8]}.json": found, "held-out-2-rows.json": few}
    assert found["data"]["held_out"] is False
    assert found["data"]["files"] == [{"path": str(other), "sha256": digest}]
    assert found["data"]["command"] == f"qlora eval {run.path} --data '{other}'"
    assert few["data"] | {"rows_in_all": 6, "rows": 2, "held_out": True} == few["data"]
    [listed] = [entry for entry in adapters(tmp_path) if entry["path"] == str(run.path)]
    assert listed["metrics"] == own["metrics"]
