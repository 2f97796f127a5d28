"""notebooks/quickstart.ipynb: committed without outputs, all that it calls exists; and, slowly, run from top to bottom."""

import ast
import importlib
import inspect
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import quickstart_model

import qlora
from qlora import Recipe

ROOT = Path(__file__).parents[1]
FILE = ROOT / "notebooks" / "quickstart.ipynb"
NOTEBOOK = json.loads(FILE.read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
MODEL = quickstart_model.cache_folder() / "SmolLM2-135M-Instruct"


def text(cell):
    return "".join(cell["source"])


def test_it_is_committed_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert not [cell for cell in CODE if cell["outputs"] or cell["execution_count"] is not None]
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)


def calls():
    """Yield (module, name, call) of each call of a module's function in the code."""
    for node in ast.walk(ast.parse("\n".join(map(text, CODE)))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            yield node.func.value.id, node.func.attr, node


def test_what_it_calls_is_public_and_takes_what_it_is_given():
    checked = 0
    for module, name, call in calls():
        if module not in ("qlora", "quickstart_data", "quickstart_model"):
            continue
        if module == "qlora":
            assert name in qlora.__all__
        function = getattr(importlib.import_module(module), name)
        inspect.signature(function).bind(*call.args, **{keyword.arg: None for keyword in call.keywords})
        checked += 1
    assert checked >= 9


def test_its_recipe_loads(monkeypatch):
    monkeypatch.chdir(ROOT)
    (cell,) = [cell for cell in CODE if "Recipe.load" in text(cell)]
    names = {"qlora": qlora, "model": "some folder", "rows": Path("rows"), "FOLDER": "runs/x", "STEPS": 7}
    exec(text(cell), names)
    recipe = names["recipe"]
    assert isinstance(recipe, Recipe)
    assert (recipe.training.max_steps, recipe.output_dir, recipe.model.name_or_path) == (7, "runs/x", "some folder")


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="no model; python scripts/quickstart_model.py makes it")
def test_it_runs_from_top_to_bottom_and_shows_progress(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(FILE, as_version=4)
    (at,) = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    asked = f"STEPS, ROWS, HELD_OUT, FOLDER = 2, 40, 4, {str(tmp_path / 'small')!r}"
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(asked))
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=400, resources=resources).execute()

    shown = {text(cell): json.dumps(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"}
    for call, expected in {
        "qlora.doctor(": "ready to train",
        "qlora.train(": "step 2/2",
        "qlora.evaluate(": "exact match",
        "qlora.export(": "proven",
    }.items():
        (output,) = [output for source, output in shown.items() if call in source]
        assert expected in output, output
        assert "ipywidgets" not in output
    assert (tmp_path / "small.html").stat().st_size > 10_000
