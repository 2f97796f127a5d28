"""The command line as a user has it: exit codes, messages without tracebacks, JSON for scripts."""

import json
import os
import subprocess
import sys
import time

import pytest

from qlora import process
from qlora.system.streams import Lasting
from tests import forked
from tests.conftest import CONVERSATIONS


def qlora(*arguments, stdin=""):
    """Return what came of a command as its user starts it, imports and all."""
    command = [sys.executable, "-m", "qlora", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)


def test_help_is_fast_and_every_verb_has_an_example():
    start = time.monotonic()
    top = qlora("--help")
    assert time.monotonic() - start < 5  # 0.1 s alone; this catches an import of torch at the top, which takes 6
    assert top.returncode == 0
    assert qlora("frobnicate").returncode == 2
    for verb in ("doctor", "plan", "data", "train", "eval", "export", "compare", "report", "chat", "adapters", "push"):
        assert verb in top.stdout
        text = qlora(verb, "--help").stdout
        assert f"Example:  qlora {verb}" in text


def test_importing_the_package_does_not_import_torch():
    code = (
        "import sys, qlora, qlora.cli, qlora.recipe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("words", "allowed"), [("adapters .", {"torch"}), ("recipes", set()), ("plan --card list", set())]
)
def test_a_list_is_there_at_once(tmp_path, words, allowed):
    """Libraries of models take ten seconds to import."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    code = (
        f"import sys; from qlora import cli; cli.app({words.split()}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'datasets', 'trl'} & sys.modules.keys()\n"
        "print('imported', *sorted(heavy))"
    )
    environ = os.environ | {"PYTHONPATH": str(forked.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *said, imported = done.stdout.splitlines()
    assert len(said) > 2
    assert set(imported.split()) - {"imported"} <= allowed


def test_the_whole_way_from_the_command_line(recipe_file, tmp_path):
    trained = forked.run("train", recipe_file, "training.max_steps=3", "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["last"]["step"] == 3
    assert "100% of rows end with a stop token" in trained.stderr
    assert "trainable parameters" in trained.stderr
    assert "Warning" not in trained.stderr

    scores = forked.run("eval", tmp_path / "run", "--json", "--max-rows", "2")
    assert scores.returncode == 0, scores.stderr
    assert json.loads(scores.stdout)["rows"] == 2

    exported = forked.run("export", tmp_path / "run", "--out", tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    assert "proof on 6 held-out rows" in exported.stdout
    assert "proven; the model is in" in exported.stderr

    answer = forked.run("chat", tmp_path / "out", "--prompt", CONVERSATIONS[0][0][1], "--max-new-tokens", "5")
    assert answer.returncode == 0, answer.stderr
    talked = forked.run("chat", tmp_path / "out", "--max-new-tokens", "5", stdin=CONVERSATIONS[0][0][1] + "\n/reset\n")
    assert talked.stdout.strip() == answer.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "none.yaml"], "qlora: no recipe at none.yaml"),
        (["train", "RECIPE", "lora.rnak=3"], "override  lora.rnak: unknown field; did you mean lora.r?"),
        (["train", "RECIPE", "data.train=none.jsonl"], "no data file at none.jsonl"),
        (["eval", "runs/none"], "neither a run nor a model at runs/none"),
        (["export", "runs/none", "--out", "x"], "no run at runs/none"),
        (["export", "runs/none"], "Missing option '--out'"),
        (["chat", "./none", "--prompt", "x"], "neither a run nor a model at ./none"),
        (["frobnicate"], "No such command"),
    ],
)
def test_wrong_input_exits_2_with_one_message_and_no_traceback(recipe_file, arguments, expected):
    done = forked.run(*[recipe_file if argument == "RECIPE" else argument for argument in arguments])
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_failed_proof_exits_4(recipe_file, tmp_path):
    assert forked.run("train", recipe_file).returncode == 0
    code = (
        "import sys; from qlora.methods.low_rank import LowRank; LowRank.merged = lambda self, base, rows=None: base\n"
        f"sys.argv = ['qlora', 'export', {str(tmp_path / 'run')!r}, '--out', {str(tmp_path / 'out')!r}]\n"
        "from qlora.cli import main; main()"
    )
    done = forked.run("-c", code)
    assert done.returncode == 4
    assert "the export differs from the trained model" in done.stderr
    assert not (tmp_path / "out").exists()


def test_out_of_memory_exits_3_with_a_remedy(recipe_file):
    code = (
        "import sys, torch; from qlora import training\n"
        "def full(*args, **kwargs): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')\n"
        f"training.train = full; sys.argv = ['qlora', 'train', {str(recipe_file)!r}]\n"
        "from qlora.cli import main; main()"
    )
    done = forked.run("-c", code)
    assert done.returncode == 3
    assert "out of memory: 2 GiB requested" in done.stderr
    assert "shorter rows" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_under_what_is_printed_is_named(capsys):
    """As in `qlora adapters > /full/disk/list`."""
    with open("/dev/full", "w") as full:
        with pytest.raises(SystemExit, match="2"):
            process._run(lambda: Lasting(full).write("x" * 2**20))
        with open("/dev/null", "w") as empty:
            os.dup2(empty.fileno(), full.fileno())  # what is buffered goes there at its end
    assert capsys.readouterr().err == (
        "qlora: /dev/full: No space left on device; free some space and run this again\n"
    )
