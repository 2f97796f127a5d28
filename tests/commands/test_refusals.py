"""Everything that can be wrong is found before a weight is read, and leaves no run folder behind."""

import pytest

from qlora.commands.train import train
from qlora.system.errors import InputError
from tests.conftest import CHATML, make_tokenizer, messages, write_jsonl

pytestmark = pytest.mark.usefixtures("no_model_is_loaded")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"data": {"train": "none.jsonl"}}, "no data file at none.jsonl"),
        ({"data": {"max_length": 10}}, "data.max_length is 10"),
        ({"data": {"columns": {"prompt": "q", "completion": "a"}}}, "has no column 'q', 'a'; it has messages"),
        ({"data": {"chat_template": "none.jinja"}}, "none.jinja"),
        ({"data": {"eval_fraction": 0.99}}, "leaves no training rows"),
        ({"model": {"name_or_path": "./none"}}, "no such folder"),
        ({"model": {"revision": "main"}}, "has no revisions"),
        ({"output_dir": "/proc/run"}, "output_dir /proc/run"),
        (
            {"memory": {"gradient_checkpointing": 3}},
            "gradient_checkpointing is 3, but the model has 2 layers; set 0 to 2",
        ),
        (
            {"memory": {"gradient_checkpointing": False, "offload": True}},
            "memory.offload moves the inputs of checkpointed",
        ),
    ],
)
def test_wrong_input_is_found_before_the_model_is_loaded(make_recipe, tmp_path, sections, expected):
    recipe = make_recipe(**sections)
    with pytest.raises(InputError, match=expected):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_a_bad_line_is_named(make_recipe, tmp_path):
    recipe = make_recipe()
    with open(recipe.data.train[0].path, "a") as file:
        file.write('{"messages": [}\n')
    with pytest.raises(InputError, match="line 25  not valid JSON"):
        train(recipe)


def test_an_output_folder_that_is_in_use_is_refused_and_untouched(make_recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        train(make_recipe())
    assert (tmp_path / "run" / "mine").read_text() == "x"


def test_a_row_longer_than_the_model_has_positions_is_refused(make_recipe, tmp_path):
    long = messages([("user", "x " * 600), ("assistant", "x")])
    rows = write_jsonl(tmp_path / "t.jsonl", [{"messages": long}] * 2)
    with pytest.raises(InputError, match=r"t.jsonl line 1: [\d,]+ tokens, the model has 512 positions"):
        train(make_recipe(data={"train": str(rows), "eval_fraction": 0.0, "max_length": 4096}))


def test_a_tokenizer_of_another_model_is_refused(make_recipe, tmp_path, tiny_model, tokenizer_json):
    import json
    import shutil

    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tokenizer = make_tokenizer(tokenizer_json, CHATML)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(300)])
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    rows = write_jsonl(tmp_path / "t.jsonl", [{"messages": messages([("user", "<extra299>"), ("assistant", "x")])}] * 3)
    assert len(tokenizer) > config["vocab_size"]
    with pytest.raises(InputError, match="do not belong together"):
        train(make_recipe(model={"name_or_path": str(folder)}, data={"train": str(rows), "eval_fraction": 0.0}))
