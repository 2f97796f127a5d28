"""What a person sees of the verbs: lines folded on a terminal, whole in a file; results apart from notes; or nothing."""

import fcntl
import io
import logging
import os
import pty
import re
import struct
import termios
import threading
import warnings

import pytest
from rich.console import Console

import qlora
from qlora import train
from qlora.commands.adapters import adapters
from qlora.commands.data import inspect_data
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.push import push
from qlora.recipe import Recipe
from qlora.system.events import note
from qlora.terminal import lines, quiet, shown, tables
from tests import forked
from tests.conftest import CONVERSATIONS, messages, write_jsonl


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Return the text that goes to a terminal of 80 columns."""
    screen = Screen()
    fake = Console(file=screen, force_terminal=True, width=80, highlight=False, color_system=None)
    monkeypatch.setattr(lines, "console", fake)
    monkeypatch.setattr(tables, "console", fake)
    return screen


def refuse_wide(screen):
    """Assert that no line is wider than 80 columns but for a path or a command, which stay whole; empties the screen."""
    text = re.sub(r"\n---\n.*\n", "\n", screen.getvalue(), flags=re.DOTALL)  # the card, as it is uploaded
    screen.truncate(0)
    screen.seek(0)
    lines = [line for line in text.splitlines() if "\x1b" not in line]  # of a bar, which goes away
    wide = [line for line in lines if len(line) > 80 and len(line.split()) > 1 and "qlora " not in line]
    assert not wide, "\n".join(wide)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model):
    """Return the folder that holds a run "run", the recipe's values, and what they are relative to."""
    folder = tmp_path_factory.mktemp("somewhere")
    rows = [{"messages": messages(turns), "source": "a list"} for turns in CONVERSATIONS]
    write_jsonl(folder / "rows.jsonl", rows)
    values = {
        "model": {"name_or_path": str(tiny_model("llama"))},
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 128, "eval_fraction": 0.25},
        "training": {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
                     "learning_rate": 3e-2, "warmup_ratio": 0},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    train(Recipe.from_dict(values))
    return folder, Recipe.from_dict(values)


VERBS = {
    "adapters": (lambda run, recipe, out: adapters(run.parent), "steps"),
    "data": (lambda run, recipe, out: inspect_data(recipe), "steps     "),
    "plan": (lambda run, recipe, out: qlora.plan(recipe, "24GiB"), "peak"),
    "plan, too little": (lambda run, recipe, out: qlora.plan(recipe, "20MiB"), "DOES NOT FIT"),
    "eval": (lambda run, recipe, out: evaluate(run), "perplexity"),
    "eval of the base": (lambda run, recipe, out: evaluate(recipe.model.name_or_path, recipe.data.train[0].path), "loss"),
    "export": (lambda run, recipe, out: export(run, out, compare_bases=True), "same top-1"),
    "export of an adapter": (
        lambda run, recipe, out: export(run / "adapter", out, "bfloat16", model=recipe.model.name_or_path), "assumed"),
    "push": (lambda run, recipe, out: push(run, "me/a-model", dry_run=True), "adapter_model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_lines_and_tables_of_every_verb_keep_to_80_columns_on_a_terminal(trained, terminal, tmp_path, verb):
    folder, recipe = trained
    call, expected = VERBS[verb]
    call(folder / "run", recipe, tmp_path / "out")
    shown = refuse_wide(terminal)
    assert expected in shown
    assert "\u2026" not in shown  # nothing is cut


def test_no_part_of_a_message_is_taken_for_a_picture(capsys):
    with shown():
        note("runs:x:1 is there")
        tables.show("runs:x:1 is there")
    assert [*capsys.readouterr()] == ["runs:x:1 is there\n"] * 2


def test_an_error_is_folded_on_a_terminal():
    read, written = pty.openpty()
    fcntl.ioctl(written, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = ["export", "runs/none", "--model", "x", "--out", "y", "--dtype", "float7"]
    with forked.Process(*command, err=os.ttyname(written)) as process:
        assert process.wait(60) == 2
    os.close(written)
    said = os.read(read, 10_000).decode()
    os.close(read)
    assert said.startswith("qlora: ")
    assert all(len(line) <= 80 for line in said.splitlines())


def test_lines_of_a_training_keep_to_80_columns_on_a_terminal(make_recipe, terminal, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train(make_recipe(output_dir="run"))
    printed = [line for line in terminal.getvalue().splitlines() if "\x1b" not in line and "/" not in line]
    assert len(printed) > 8
    assert max(map(len, printed)) <= 80
    assert "\n          " in terminal.getvalue()  # a folded line goes on under its words


def test_a_command_stays_on_one_line(terminal):
    command = "qlora train 'my runs/with a long name/and another one/recipe.yaml' --resume training.learning_rate=1e-5"
    lines.say(f"stopped after step 12 of 100 of this run; go on with: {command}; or begin again")
    assert command in terminal.getvalue().splitlines()[1]


def test_lines_and_tables_are_whole_in_a_file(capsys):
    with shown():
        note("word " * 40)
        assert len(capsys.readouterr().err.splitlines()) == 1
        tables.table("word " * 40, ["", "number"], [["word " * 40, "1"]])
    assert sum("word" in line for line in capsys.readouterr().out.splitlines()) == 2


def test_quiet_verbs_print_nothing_and_return_the_same(trained, capfd):
    folder, recipe = trained
    with quiet():
        evaluate(folder / "run")  # first: the list has its scores
        listed, planned, report = adapters(folder), qlora.plan(recipe, "24GiB"), inspect_data(recipe)
        warnings.warn_explicit("changes", FutureWarning, "here.py", 1, "transformers.modeling")
    assert [*capfd.readouterr()] == ["", ""]
    assert (adapters(folder), qlora.plan(recipe, "24GiB"), inspect_data(recipe)) == (listed, planned, report)
    out, err = capfd.readouterr()
    assert "reached in:" in out
    assert "rows to train on" in err


def test_after_a_quiet_block_the_libraries_print_as_they_did():
    from datasets.utils import are_progress_bars_disabled
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    def settings():
        loggers = [logging.getLogger(name).level for name in ("bitsandbytes", "bitsandbytes.backends.cpu.ops")]
        bars = (
            transformers_logging.is_progress_bar_enabled(),
            not are_progress_bars_disabled(),
            not hub.are_progress_bars_disabled(),
        )
        return loggers, bars, transformers_logging.get_verbosity(), [*warnings.filters], dict(os.environ)

    def fail():
        with quiet():
            assert settings()[1] == (False, False, False)
            raise ValueError("no")

    before = settings()
    with pytest.raises(ValueError, match="no"):
        fail()
    assert settings() == before


def test_the_end_of_a_quiet_block_in_another_thread_does_not_end_this_one():
    from transformers.utils import logging as transformers_logging

    entered, left, before = threading.Event(), threading.Event(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()

    def other():
        with quiet():
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    try:
        thread.start()
        assert entered.wait(60)
        with quiet():
            left.set()
            thread.join(10)
            assert not transformers_logging.is_progress_bar_enabled()
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        if not before:
            transformers_logging.disable_progress_bar()


def test_without_results_the_notes_are_still_there(trained, capfd):
    _, recipe = trained
    with shown(results=False):
        inspect_data(recipe)
    out, err = capfd.readouterr()
    assert out == ""
    assert "rows to train on" in err


def test_the_outermost_block_decides_and_everything_is_printed_once(capsys):
    @shown()
    def verb():
        note("from the verb")

    with shown():
        verb()
    assert capsys.readouterr().err == "from the verb\n"
    with quiet(), shown():
        verb()
    assert capsys.readouterr().err == ""
    note("nobody listens")
    assert capsys.readouterr().err == ""
