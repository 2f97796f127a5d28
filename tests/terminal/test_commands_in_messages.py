"""A command that is printed can be pasted: what may hold spaces stands in quotes."""

import re
from pathlib import Path

import pytest

import qlora
from qlora.commands.init import init
from tests.conftest import CONVERSATIONS, messages, write_jsonl

SOURCE = Path(qlora.__file__).parent
COMMAND = re.compile(
    r"qlora (?:train|eval|export|chat|report|plan|data|compare|push|adapters)((?: --?[\w-]+| \{[^{}]*\})*)"
)
QUOTED = {"named", "run", "page"}  # variables that hold what shlex.quote returned
OWN = {"name"}  # a shipped recipe's


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_a_command_names_is_quoted(path):
    for command in COMMAND.finditer(path.read_text(encoding="utf-8")):
        for value in re.findall(r"\{([^{}]*)\}", command[1]):
            assert "shlex.quote(" in value or value in QUOTED | OWN, command[0]


def test_what_init_prints_and_writes_can_be_pasted(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = write_jsonl(tmp_path / "my rows.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS * 3])
    init(str(tiny_model()), str(rows), "cpu", out=tmp_path / "my recipe.yaml")
    said = capsys.readouterr()
    for command in (f"qlora train '{tmp_path}/my recipe.yaml'", f"qlora plan '{tmp_path}/my recipe.yaml' --card cpu"):
        assert command in (tmp_path / "my recipe.yaml").read_text()
    assert f"qlora train '{tmp_path}/my recipe.yaml'" in said.err
    assert "qlora report 'runs/my rows' --out 'my rows-report.html'" in said.err
