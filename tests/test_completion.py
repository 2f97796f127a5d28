"""What a shell proposes after TAB, asked as a shell asks; without torch, because a person waits."""

import os
import subprocess
import sys

import pytest

from qlora import completion
from qlora.system import cards

ASK = "import sys, runpy; sys.argv = ['qlora']\ntry: runpy.run_module('qlora')\nfinally: assert 'torch' not in sys.modules"


def proposed(line):
    """Return what bash is given for a command line that ends where TAB is pressed."""
    words = line.split()
    at = len(words) - (not line.endswith(" "))
    env = os.environ | {"_QLORA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(at)}
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qlora re", ["recipes", "report"]),
        ("qlora recipes ", ["show", "copy"]),
        ("qlora recipes show gpt", ["gpt2/imdb"]),
        ("qlora plan mine.yaml --card 309", ["3090", "3090-ti"]),
        ("qlora train mine.yaml --res", ["--resume"]),
    ],
)
def test_what_is_proposed(line, expected):
    assert proposed(line) == expected


def test_cards_are_proposed_as_the_planner_reads_them():
    names = completion.card_names("")
    assert len(names) == len(cards.CARDS)
    assert [cards.card_of(name) for name in names] == list(cards.CARDS)
    assert not [name for name in names if " " in name]


def test_without_recipes_none_is_proposed(monkeypatch, tmp_path):
    monkeypatch.setattr("qlora.system.shipped._PACKAGE", tmp_path / "qlora")
    assert completion.recipe_names("") == []
