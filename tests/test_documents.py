"""What the documents say can be typed: commands are parsed by the command line, Python is compiled, recipes are loaded."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from qlora import Recipe, cli
from qlora.recipe.comparison import Comparison, entries

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
REQUIRED = {"model": {"name_or_path": "x"}, "data": {"train": "x"}, "output_dir": "x"}
WITH_RECIPE = {"plan", "data", "train"}


def blocks(path):
    """Return [(first line number, text)] of a document's indented and fenced blocks."""
    found, current, fenced, start = [], [], False, 0
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), "end"], start=1):
        fence = line.strip().startswith("```")
        if (fenced and not fence) or (not fenced and line.startswith("    ")) or (current and not line.strip()):
            start = start if current else number
            current.append(line if fenced else line[4:])
        elif current:
            found.append((start, "\n".join(current).rstrip()))
            current = []
        fenced ^= fence
    return found


ALL = [(path, number, text) for path in DOCUMENTS for number, text in blocks(path)]


def cases(chosen):
    return [pytest.param(text, id=f"{path.name}:{number}") for path, number, text in ALL if chosen(text)]


def commands(text):
    """Return the words of each command of ours in a block."""
    lines = text.replace("\\\n", " ").splitlines()
    typed = [line.strip().removeprefix("$ ") for line in lines]
    return [shlex.split(line, comments=True) for line in typed if re.match(r"qlora [a-z-]+( |$)", line)]


def parse(words):
    group = typer.main.get_command(cli.app)
    context = group.make_context("qlora", words[1:2], resilient_parsing=True)
    name, command, _ = group.resolve_command(context, words[1:])
    assert command is not None, f"No such command {words[1]}"
    return command.make_context(name, words[2:], parent=context).params


@pytest.mark.parametrize("text", cases(commands))
def test_commands_are_parsed_by_the_command_line(text):
    for words in commands(text):
        params = parse(words)
        overrides = [word for word in params.get("overrides") or () if word != "..."]
        if words[1] in WITH_RECIPE:
            Recipe.from_dict(REQUIRED, [one for one in overrides if not one.startswith("[")])


@pytest.mark.parametrize(
    "command", ["qlora frobnicate x", "qlora train x.yaml --no-such-option", "qlora export runs/x"]
)
def test_a_wrong_command_is_noticed(command):
    with pytest.raises(Exception, match=r"No such|Missing"):
        parse(command.split())


def is_python(text):
    return re.match(r"(from \w[\w.]* import |import \w)", text) is not None


@pytest.mark.parametrize("text", cases(is_python))
def test_python_is_compiled_and_its_names_exist(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "qlora":
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def is_recipe(text):
    return re.match(rf"(# .*\n)*({'|'.join(Recipe.model_fields)}):", text) is not None


@pytest.mark.parametrize("text", cases(is_recipe))
def test_recipes_are_loaded(text, tmp_path):
    """A block may have several alternatives, which begin with the same section."""
    pieces, sections = [[]], set()
    for line in text.splitlines():
        section = re.match(r"(\w+):", line)
        if section and section[1] in sections:
            pieces.append([])
            sections = set()
        sections |= {section[1]} if section else set()
        pieces[-1].append(line)
    for piece in pieces:
        file = tmp_path / "recipe.yaml"
        file.write_text("\n".join(piece).replace("...", "x") + "\n")
        missing = [
            f"{name}={value}"
            for name, value in (("model.name_or_path", "x"), ("data.train", "x"), ("output_dir", "x"))
            if not re.search(rf"^ *{name.rpartition('.')[2]}:|[{{ ]{name.rpartition('.')[2]}:", "\n".join(piece), re.M)
        ]
        Recipe.load(file, missing)


def test_there_is_something_of_each_kind():
    assert sum(len(commands(text)) for _, _, text in ALL) > 20
    assert len(cases(is_python)) >= 1
    assert len(cases(is_recipe)) >= 3


@pytest.mark.parametrize("text", cases(lambda text: text.startswith("base:")))
def test_comparisons_are_loaded(text, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = Comparison.load(write_text(tmp_path / "comparison.yaml", text))
    if Path(found.base).is_file():
        assert len(entries(found)) >= len(found.variants) * len(found.seeds or [None])


def write_text(path, text):
    path.write_text(text)
    return path
