"""qlora data shows what training will see, and reads no weight."""

import json
import shutil

import pytest

from qlora.commands.data import inspect_data
from qlora.commands.eval import evaluate
from qlora.commands.train import train
from qlora.system.errors import InputError
from tests.conftest import CONVERSATIONS, messages, write_jsonl


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
    assert "'<|im_end|>':2 ]]'" in shown


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_page_holds_the_report_and_the_rows_and_nothing_of_a_row_is_markup(make_recipe, tmp_path):
    turns = [("user", "<script>alert(1)</script>"), ("assistant", "No \x1b[31mred.")]
    train_file = write_jsonl(tmp_path / "t.jsonl", [{"messages": messages(turns)}, {"words": 1}])
    file = tmp_path / "page.html"
    recipe = make_recipe(data={"train": str(train_file), "eval_fraction": 0.0, "on_bad_row": "skip"})
    inspect_data(recipe, html=str(file))
    page = file.read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert '<span class="t ">No ␛[31mred.</span><span class="t s">&lt;|im_end|&gt;</span>' in page
    assert "keys words match no known format" in page
    assert f"{train_file} line 1" in page
    with pytest.raises(InputError, match="--html"):
        inspect_data(recipe, html=str(tmp_path / "no" / "page.html"))
    inspect_data(recipe, html=str(file))  # its own is written again
    file.write_text("mine")
    with pytest.raises(InputError, match=r"page\.html is there and was not written by qlora data; choose another name"):
        inspect_data(recipe, html=str(file))
    assert file.read_text() == "mine"


@pytest.mark.usefixtures("no_model_is_loaded")
def test_the_page_says_what_of_the_rows_is_not_used_as_the_terminal_does(make_recipe, tmp_path, capsys):
    call = {"function": {"name": "look", "arguments": {"at": "the moon", "from": None}}}
    turns = [*messages([("user", "Look."), ("assistant", "I shall.")]), {"role": "assistant", "tool_calls": [call]}]
    train_file = write_jsonl(tmp_path / "t.jsonl", [{"messages": turns, "mood": 7, "topic": "sky"}])
    file = tmp_path / "page.html"
    recipe = make_recipe(data={"train": str(train_file), "eval_fraction": 0.0, "chat_template": "chatml"})
    inspect_data(recipe, html=str(file))
    said, page = " ".join(capsys.readouterr().err.split()), file.read_text(encoding="utf-8")
    for line in (
        "unused keys: ",
        "mood (1 rows)",
        "topic (1 rows)",
        "1 rows had consecutive assistant messages merged into one turn",
        "1 rows had null fields removed from tool calls",
    ):
        assert line in said
        assert line in page


@pytest.mark.usefixtures("no_model_is_loaded")
def test_what_would_never_learn_to_stop_is_shown_and_refused(make_recipe, tmp_path, capsys):
    turns = [("user", "Hi"), ("assistant", "word " * 100)]
    train_file = write_jsonl(tmp_path / "t.jsonl", [{"messages": messages(turns)}])
    recipe = make_recipe(
        data={"train": str(train_file), "eval_fraction": 0.0, "max_length": 30, "overlong": "truncate"}
    )
    with pytest.raises(InputError, match="never learn to stop"):
        inspect_data(recipe)
    assert "1 TRUNCATED" in capsys.readouterr().err
    with pytest.raises(InputError, match="never learn to stop"):
        train(recipe)


@pytest.mark.usefixtures("no_model_is_loaded")
def test_nothing_left_is_refused_with_the_reasons(make_recipe):
    with pytest.raises(InputError, match=r"no rows left to train on\n  .*24 of 24 rows dropped: 24 .*max_length 8"):
        inspect_data(make_recipe(data={"max_length": 8, "overlong": "drop"}))


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
    assert "2 HELD-OUT ROWS ARE ALSO TRAINED ON" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_row_that_is_not_there_is_refused(make_recipe):
    with pytest.raises(InputError, match="the data has rows 1 to 18"):
        inspect_data(make_recipe(), row=19)


def test_a_model_folder_without_weights_will_do(make_recipe, tmp_path):
    recipe = make_recipe()
    folder = tmp_path / "no-weights"
    shutil.copytree(recipe.model.name_or_path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert inspect_data(make_recipe(model={"name_or_path": str(folder)})) == inspect_data(recipe)


def test_train_writes_the_same_report(make_recipe):
    recipe = make_recipe()
    report = inspect_data(recipe)
    assert json.loads(train(recipe).data_report_file.read_text()) == report


def test_held_out_rows_that_are_all_bad_are_an_error_and_no_evaluation_less(make_recipe, own_run, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n{"messages": [{"role": "user", "content": "no answer"}]}\n')
    recipe = make_recipe(data={"eval_fraction": 0.0, "eval": str(bad), "on_bad_row": "skip"})
    with pytest.raises(InputError, match=r"no rows left to evaluate on\n  .*bad.jsonl: 2 of 2 rows dropped"):
        inspect_data(recipe)
    with pytest.raises(InputError, match=r"no rows left to evaluate on in .*bad.jsonl: all were dropped"):
        evaluate(own_run.path, bad, ["data.on_bad_row=skip"])
    assert not own_run.eval_file.exists()
