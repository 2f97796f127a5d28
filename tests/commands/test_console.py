"""Lines for a person: folded on a terminal, whole in a file."""

import io

import pytest
from rich.console import Console

from qlora import train
from qlora.commands import console


@pytest.fixture
def terminal(monkeypatch):
    """Return the text that goes to a terminal of 80 columns."""
    screen = io.StringIO()
    fake = Console(file=screen, force_terminal=True, width=80, highlight=False, color_system=None)
    monkeypatch.setattr(console, "_console", fake)
    return screen


def test_lines_of_a_training_keep_to_80_columns_on_a_terminal(make_recipe, terminal, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train(make_recipe(output_dir="run"))
    lines = [line for line in terminal.getvalue().splitlines() if "\x1b" not in line and "/" not in line]
    assert len(lines) > 8
    assert max(map(len, lines)) <= 80
    assert "\n          " in terminal.getvalue()  # a folded line goes on under its words


def test_a_command_stays_on_one_line(terminal):
    command = "qlora train 'my runs/with a long name/and another one/recipe.yaml' --resume training.learning_rate=1e-5"
    console.say(f"stopped after step 12 of 100 of this run; go on with: {command}; or begin again")
    assert command in terminal.getvalue().splitlines()[1]


def test_lines_are_whole_in_a_file(capsys):
    console.say("word " * 40)
    assert len(capsys.readouterr().err.splitlines()) == 1
