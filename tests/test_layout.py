"""The house: imports point down, and what the documents say exists."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qlora"

# What stands together may use each other, but in no cycle: below.
LEVELS = [
    {"system"},
    {"recipe"},
    {"methods", "kernels", "data", "base_model", "runs"},
    {"training", "planner", "exporter", "evaluation"},
    {"jobs"},
    {"terminal", "pages"},
    {"commands"},
    {"cli", "completion", "options", "process"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path):
    """Return the parts of qlora that a file imports, wherever in the file."""
    package = ["qlora", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            found |= {target[1]} if len(target) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qlora":
            found.add([*node.module.split("."), "__init__"][1])
    return found - {part_of(path)}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = part_of(path)
    for other in imported_parts(path) - {"__init__"}:
        assert LEVEL[other] <= LEVEL[own], f"{own} imports {other}, which is above it"


def test_parts_have_no_import_cycles():
    graph = {}
    for path in FILES:
        graph.setdefault(part_of(path), set()).update(imported_parts(path))
    seen = set()

    def visit(part, trail):
        assert part not in trail, " > ".join([*trail, part])
        if part not in seen:
            for other in graph.get(part, ()):
                visit(other, [*trail, part])
            seen.add(part)

    for part in graph:
        visit(part, [])


def test_only_commands_see_a_whole_recipe():
    for path in FILES:
        if part_of(path) not in {"commands", "jobs", "cli", "recipe", "runs", "__init__"}:
            assert not re.search(r"\bRecipe\b", path.read_text(encoding="utf-8")), path


def test_only_the_terminal_and_the_verbs_print():
    """All others emit events (system/events.py), or return what they found."""
    for path in FILES:
        if part_of(path) not in {"terminal", "commands", "cli", "process"}:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(?:from|import) rich\b|(?<![\w.])print\(", text, flags=re.MULTILINE), path
            assert "terminal" not in imported_parts(path) or part_of(path) == "__init__", path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    """500 lines; 60 and 8 parameters, but for the options of a verb on the command line, which are typer's parameters."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert node.end_lineno - node.lineno < 60, f"{node.name} in line {node.lineno}"
            assert len(set(names) - {"self", "cls"}) <= 8 or path.name == "cli.py", f"{node.name} in line {node.lineno}"


def test_each_folder_says_what_it_is_for():
    for folder in {path.parent for path in FILES}:
        init = folder / "__init__.py"
        assert init.is_file(), init
        assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), init


def test_there_is_no_utils():
    assert not [path for path in FILES if path.stem in {"utils", "helpers", "misc", "common"}]


def test_no_module_is_named_like_a_public_function():
    """Importing it would put the module where the function is: `from qlora import export` was a package once."""
    import qlora

    public = {name for name in qlora.__all__ if callable(getattr(qlora, name))}
    top = {part_of(path) for path in FILES if path.parent == PACKAGE or path.name == "__init__.py"}
    assert {"train", "export", "plan"} <= public
    assert not public & top


def test_the_tree_in_the_layout_is_the_tree_on_disk():
    layout = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    for path in FILES:
        if path.name != "__init__.py":
            assert re.search(rf"\b{path.name}\b", layout), f"docs/layout.md has no line for {path.relative_to(PACKAGE)}"


def test_the_files_and_rooms_that_the_layout_names_exist():
    text, _, tree = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8").partition("## All files")
    named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", text)
    assert len(named) > 40
    for name in named:
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), name
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        assert [path for path in FILES if path.name == name], f"docs/layout.md names {name}, which is not there"


@pytest.mark.parametrize(
    "document", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda path: path.name
)
def test_files_and_verbs_that_documents_name_exist(document):
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"(?:scripts|recipes|docs|tests)/[\w./-]+\.(?:sh|py|yaml|md)", text):
        assert (ROOT / name).is_file(), name
    for verb in re.findall(r"^ +qlora (\w+)", text, flags=re.MULTILINE):
        assert verb in {
            "init",
            "recipes",
            "doctor",
            "plan",
            "data",
            "train",
            "eval",
            "export",
            "compare",
            "report",
            "chat",
            "adapters",
            "push",
        }, verb


def test_what_is_pinned_is_in_range_and_python_versions_agree():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pins.setdefault(requirement.name, []).append(next(iter(requirement.specifier)).version)
    extras = [entry for group in project["optional-dependencies"].values() for entry in group]
    for entry in [*project["dependencies"], *extras]:
        requirement = Requirement(entry)
        assert requirement.name in pins, f"{requirement.name} is not pinned"
        assert all(version in requirement.specifier for version in pins[requirement.name]), entry
    assert project["requires-python"] == ">=3.10,<3.14"


@pytest.mark.parametrize(
    "module", sorted(path for path in PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name
)
def test_what_a_package_says_it_has_is_there(module):
    found = importlib.import_module(".".join(module.parent.relative_to(PACKAGE.parent).parts))
    assert [name for name in getattr(found, "__all__", ()) if not hasattr(found, name)] == []
