"""qlora data shows what training will see, and reads no weight."""

import json

import pytest

from qlora import base_model
from qlora.commands.data import inspect_data
from qlora.commands.train import train
from qlora.errors import InputError
from tests.conftest import CONVERSATIONS, messages, write_jsonl


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(base_model, "load", load)


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_row_is_rendered_with_what_is_trained_marked(make_recipe, capsys):
    inspect_data(make_recipe(data={"eval_fraction": 0.0}), row=6)
    shown = capsys.readouterr().out
    (_, question), (_, answer) = CONVERSATIONS[5]
    assert "row 6 (" in shown
    assert "train.jsonl line 6)" in shown
    expected = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n[[{answer}<|im_end|>]]\n"
    assert expected in shown


@pytest.mark.usefixtures("no_model_is_loaded")
def test_tokens_are_shown_with_their_ids(make_recipe, capsys, tokenizer):
    inspect_data(make_recipe(data={"eval_fraction": 0.0}), row=1, tokens=True)
    shown = capsys.readouterr().out
    assert "'<|im_start|>':1 " in shown
    assert "[['<|im_end|>':2 ]]" in shown


@pytest.mark.usefixtures("no_model_is_loaded")
def test_the_histogram_counts_every_row(make_recipe, capsys):
    report = inspect_data(make_recipe(data={"eval_fraction": 0.0}))
    lines = capsys.readouterr().out.split("lengths")[1].split("steps")[0].splitlines()[1:]
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines if line.strip()) == report["rows"]


@pytest.mark.usefixtures("no_model_is_loaded")
def test_copies_and_leaks_into_the_held_out_rows_are_counted(make_recipe, tmp_path, capsys):
    rows = [{"messages": messages(turns)} for turns in CONVERSATIONS]
    train_file = write_jsonl(tmp_path / "t.jsonl", [*rows, *rows[:3]])
    held_out = write_jsonl(
        tmp_path / "h.jsonl", [rows[0], rows[1], {"messages": messages([("user", "x"), ("assistant", "y")])}]
    )
    recipe = make_recipe(data={"train": str(train_file), "eval": str(held_out), "eval_fraction": 0.0})
    report = inspect_data(recipe)
    assert (report["duplicates"], report["eval_rows_in_training"]) == (3, 2)
    assert "2 HELD-OUT ROWS ARE TRAINED ON" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_row_that_is_not_there_is_refused(make_recipe):
    with pytest.raises(InputError, match="there are rows 1 to 18"):
        inspect_data(make_recipe(), row=19)


def test_train_writes_the_same_report(make_recipe):
    recipe = make_recipe()
    report = inspect_data(recipe)
    assert json.loads(train(recipe).data_report_file.read_text()) == report
