"""A disk that is full after a verb has computed for long: what it found is printed all the same, then the error; exit code 2."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest

from qlora import cli, process
from qlora.commands.eval import evaluate
from qlora.system import storage
from tests.commands.test_compare import comparison, in_process  # noqa: F401 (fixtures)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Return run(name, *arguments) -> (what was printed to stdout, to stderr) where no disk takes the file of that name."""
    write = storage._write_all

    def run(name, *arguments):
        def full(file, content):
            if Path(file.name).name.startswith(name):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(file, content)

        monkeypatch.setattr(storage, "_write_all", full)
        monkeypatch.setattr(sys, "argv", ["qlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            process._run(cli.app)
        said = capsys.readouterr()
        assert ended.value.code == 2, said.err
        assert "No space left on device" in said.err.splitlines()[-1], said.err
        return said.out

    return run


# the file, the words, what the table has, and what the JSON
VERBS = {
    "eval": ("answers.jsonl", "eval RUN", ["perplexity", "answers     not written"], "perplexity"),
    "eval, the score": ("eval.json", "eval RUN", ["perplexity", "answers     not written"], "perplexity"),
    "served": ("served.md", "compare RUN --served --form float16 --max-rows 1", ["float16", "Loss and KL"], "forms"),
    "plan": ("plan.svg", "plan RECIPE --plot OUT/plan.svg", ["activations"], "peak_bytes"),
    "report": ("page.json", "report RUN --out OUT/page.html", ["Did it learn"], "runs"),
    "data": ("page.html", "data RECIPE --html OUT/page.html", ["row 1"], "sources"),
}  # fmt: skip


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("verb", VERBS)
def test_what_was_found_is_printed_where_it_cannot_be_written(own_run, refused, tmp_path, verb, as_json):
    name, words, shown, key = VERBS[verb]
    names = {"RUN": str(own_run.path), "RECIPE": str(own_run.recipe_file), "OUT": str(tmp_path)}
    for short, full in names.items():
        words = words.replace(short, full)
    out = refused(name, *words.split(), *["--json"] * as_json)
    if as_json:
        assert key in json.loads(out)
    else:
        assert [text for text in shown if text not in out] == [], out
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("name", ["answers.jsonl", "eval.json"])
def test_the_score_that_was_there_is_kept(own_run, refused, name):
    evaluate(own_run.path)
    files = own_run.eval_file, own_run.answers_file
    before = [file.read_bytes() for file in files]
    refused(name, "eval", str(own_run.path))
    assert [file.read_bytes() for file in files] == before


def test_a_comparison_that_was_trained_is_shown_where_its_table_cannot_be_written(comparison, in_process, refused):  # noqa: F811
    path = comparison(max_rows=1)
    folder = path.parent / "compared"
    assert "lora" in refused("comparison.csv", "compare", path)
    assert json.loads(refused("comparison.csv", "compare", path, "--resume", "--json"))["rows"][0]["status"] == "done"
    assert not list(folder.glob("comparison.json"))


def test_a_gate_that_is_missed_leaves_the_json_on_stdout(own_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qlora", "eval", str(own_run.path), "--require", "loss>100", "--json"])
    with pytest.raises(SystemExit, match="4"):
        process._run(cli.app)
    said = capsys.readouterr()
    assert "required is > 100" in said.err
    assert json.loads(said.out) == json.loads(own_run.eval_file.read_text())
