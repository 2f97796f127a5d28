"""One limit for every verb: what a model has no position for is refused, with numbers; an answer that ends there says so."""

import json
import shutil

import pytest

from qlora import chat, evaluate, export, train
from qlora.system.errors import InputError
from tests.conftest import messages, some_slow, write_jsonl

LONG = {"messages": messages([("user", "x " * 600), ("assistant", "x")])}
SHORT = {"messages": messages([("user", "Hi"), ("assistant", "Ho")])}


@pytest.fixture
def with_positions(tiny_model, tmp_path):
    """Return make(family, count) -> a copy of the model whose config says it has `count` positions."""

    def make(family, count):
        folder = shutil.copytree(tiny_model(family), tmp_path / f"{family}-{count}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": count}))
        return folder

    return make


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_beyond_the_positions_is_refused(tiny_model, family):
    with pytest.raises(InputError, match=r"the prompt is too long: [\d,]+ tokens, and the model has 512 positions"):
        chat(tiny_model(family), "x " * 600)


def test_an_answer_ends_at_the_last_position_and_says_so(tiny_model, with_positions, capsys):
    whole = chat(tiny_model("llama"), "Hi", max_new_tokens=40)
    assert "positions" not in capsys.readouterr().err
    cut = chat(with_positions("llama", 30), "Hi", max_new_tokens=40)
    assert whole.startswith(cut)
    assert len(cut) < len(whole)
    assert "answer cut off: all 30 positions of the model are used" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_beyond_the_positions_are_refused_by_eval(tiny_model, tmp_path, family):
    rows = write_jsonl(tmp_path / "test.jsonl", [SHORT, LONG])
    with pytest.raises(InputError, match=r"test.jsonl line 2: [\d,]+ tokens, the model has 512 positions"):
        evaluate(tiny_model(family), rows)


@pytest.mark.slow
def test_a_model_without_positions_takes_any_row(tiny_model, tmp_path):
    rows = write_jsonl(tmp_path / "test.jsonl", [SHORT, LONG])
    assert evaluate(tiny_model("bloom"), rows)["rows"] == 2


def test_answers_to_rows_that_just_fit_are_counted(with_positions, tmp_path):
    """The limit of 16 tokens above the longest reference reaches past the last position."""
    model = with_positions("llama", 512)
    rows = write_jsonl(
        tmp_path / "test.jsonl", [SHORT, {"messages": messages([("user", "x " * 241), ("assistant", "x")])}]
    )
    assert evaluate(model, rows)["rows"] == 2


@pytest.mark.parametrize("method", some_slow(["prompt_tuning", "prefix_tuning"], ["prompt_tuning"]))
def test_virtual_tokens_take_positions_from_rows_prompts_and_answers(make_recipe, tmp_path, unplanned, capsys, method):
    near = {"messages": messages([("user", "x " * 220), ("assistant", "x")])}  # fits 512 positions, but not 412
    rows, section = write_jsonl(tmp_path / "near.jsonl", [SHORT, near]), {method: {"num_virtual_tokens": 100}}
    said = "the model has 512 positions, 100 of them for virtual tokens"
    with pytest.raises(InputError, match=rf"near.jsonl line 2: 4\d\d tokens, {said}\n.*data.max_length=412"):
        train(make_recipe("gpt2", **section, data={"train": str(rows), "eval_fraction": 0, "max_length": 512}))
    run = train(make_recipe("gpt2", **section, data={"max_length": 512}, training={"max_steps": 1}))
    with pytest.raises(InputError, match=rf"near.jsonl line 2: 4\d\d tokens, {said}"):
        evaluate(run.path, rows)
    with pytest.raises(InputError, match=rf"the prompt is too long: 4\d\d tokens, and {said}"):
        chat(run.path, "x " * 220)
    chat(run.path, "x " * 180, max_new_tokens=200)  # an index of 512 would be an error
    assert "answer cut off: all 512 positions of the model are used" in capsys.readouterr().err


@pytest.mark.parametrize("family", some_slow(["gpt2", "llama"], ["llama"]))
def test_proof_rows_beyond_the_positions_are_refused_by_export(make_recipe, tmp_path, family):
    run = train(make_recipe(family, data={"max_length": 4096}))
    rows = write_jsonl(tmp_path / "proof.jsonl", [SHORT, LONG])
    with pytest.raises(InputError, match=r"proof.jsonl line 2: [\d,]+ tokens, the model has 512 positions"):
        export(run.path, tmp_path / "out", data=rows)
    assert not (tmp_path / "out").exists()
