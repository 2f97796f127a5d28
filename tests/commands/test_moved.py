"""A run folder is moved, copied, or used from another directory, and is still the run that it was."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from qlora import InputError, Recipe, RunDir, evaluate, export, planner, train
from qlora.runs import record
from tests.conftest import no_plan, recipe_in

pytestmark = pytest.mark.usefixtures("unplanned")


@pytest.fixture(scope="module")
def made_once(tiny_model, tmp_path_factory):
    """Return (a folder with model, rows and a run in it, all named by relative paths; a copy of it)."""
    root = tmp_path_factory.mktemp("moved")
    project, recipe = root / "project", recipe_in(root, tiny_model(), {"training": {"save_steps": 1}})
    (project / "data").mkdir(parents=True)
    shutil.copytree(recipe.model.name_or_path, project / "models/base")
    shutil.copy(recipe.data.train[0].path, project / "data/train.jsonl")
    relative = ["model.name_or_path=models/base", "data.train=data/*.jsonl", "output_dir=runs/x"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setattr(planner, "outline", no_plan)
        (project / "mine.yaml").write_text(recipe.to_yaml())
        train(Recipe.load("mine.yaml", relative))
    return project, shutil.copytree(project, root / "kept")


@pytest.fixture
def project(made_once, tmp_path, monkeypatch):
    """Return the folder of made_once as it was made, after a chdir to another one."""
    project, kept = made_once
    shutil.rmtree(project, ignore_errors=True)
    shutil.copytree(kept, project)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return project


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def longer(folder):
    return Recipe.load(f"{folder}/recipe.yaml", ["training.max_steps=3"])


def test_a_run_is_used_from_another_directory(project):
    run = project / "runs/x"
    assert evaluate(run)["rows"] == 6
    assert export(run, "out")["verified"]
    assert train(longer(run), resume=True).path.samefile(run)
    assert record.read(RunDir(run))[-1].step == 3


def test_a_copy_goes_on_and_the_original_stays(project):
    copy = shutil.copytree(project / "runs/x", "copy")
    before = files_of(project / "runs/x")
    run = train(longer(copy), resume=True)
    assert run.path.samefile(copy)
    assert files_of(project / "runs/x") == before
    assert record.read(RunDir(copy))[-1].step == 3
    assert RunDir(copy).recipe().output_dir == "copy"


@pytest.mark.slow
def test_a_recipe_in_its_own_folder_is_named_without_a_folder(project, monkeypatch):
    monkeypatch.chdir(project / "runs/x")
    assert evaluate(".")["rows"] == 6
    assert Path(Recipe.load("recipe.yaml").output_dir).samefile(".")


def test_a_project_that_was_moved_as_a_whole_is_found(project, tmp_path):
    moved = project.rename(tmp_path / "renamed")
    assert evaluate(moved / "runs/x")["rows"] == 6
    assert export(moved / "runs/x", "out")["verified"]


def test_another_model_at_the_same_relative_path_is_refused(project, tiny_model):
    shutil.copytree(tiny_model("qwen2"), "models/base")
    with pytest.raises(InputError, match="not the base that"):
        evaluate(project / "runs/x")


def test_a_base_that_is_gone_is_named(project):
    shutil.rmtree(project / "models")
    with pytest.raises(InputError, match=r"model.name_or_path models/base: no such folder"):
        evaluate(project / "runs/x")


def test_an_override_is_taken_as_it_is(project):
    recipe = Recipe.load(project / "runs/x/recipe.yaml", ["output_dir=new", "data.train=data/train.jsonl"])
    assert recipe.output_dir == "new"
    assert recipe.data.train[0].path == "data/train.jsonl"


def test_a_recipe_beside_other_files_is_no_run(project):
    shutil.copy(project / "runs/x/recipe.yaml", "recipe.yaml")
    assert Recipe.load("recipe.yaml").output_dir == "runs/x"
    (project / "runs/x/environment.json").write_text(json.dumps({"base_model": "x"}))
    assert Recipe.load(project / "runs/x/recipe.yaml").data.train[0].path.startswith(str(project))


def test_printed_commands_can_be_pasted(make_recipe, tmp_path, monkeypatch, capsys):
    """Every command that is printed about a folder with a space in its name names that folder as one word."""
    monkeypatch.chdir(tmp_path)
    folder = "my runs/ü"
    base = shutil.copytree(make_recipe().model.name_or_path, "my base")
    train(make_recipe(model={"name_or_path": base}, output_dir=folder, training={"save_steps": 1}))
    said = [capsys.readouterr().err]
    Path(folder, "adapter").rename("my adapter")
    with pytest.raises(InputError) as error:
        train(make_recipe(output_dir=folder))
    said.append(str(error.value))
    with pytest.raises(InputError) as error:
        train(make_recipe(model={"name_or_path": "my adapter"}, output_dir="other"))
    said.append(str(error.value))
    with pytest.raises(InputError) as error:
        export("my adapter", "out")
    said.append(str(error.value))
    commands = re.findall(r"qlora (?:train|eval|export|chat|data|plan) [^`,;\n]*|--model [^;`\n]*", "\n".join(said))
    assert len(commands) >= 5, said
    for command in commands:
        assert {folder, f"{folder}/recipe.yaml", "my adapter", "my base"} & set(shlex.split(command)), command
