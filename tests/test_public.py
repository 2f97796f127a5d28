"""`from qlora import ...` as README has it: every public name, called in one process, one after another."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import qlora
from qlora import (
    InputError,
    Recipe,
    RunDir,
    adapters,
    chat,
    compare,
    compare_runs,
    compare_served,
    copy_recipe,
    doctor,
    evaluate,
    export,
    heard_by,
    init,
    inspect_data,
    list_cards,
    list_recipes,
    migrate,
    plan,
    plan_methods,
    plan_processes,
    push,
    quiet,
    report,
    show_recipe,
    train,
)
from qlora.runs import record

# a script of somebody else may name any of these arguments
SIGNATURES = {
    "init": "(model, data, card=None, goal='quality', out='recipe.yaml', overrides=()) -> 'dict'",
    "migrate": "(file, out='recipe.yaml', overrides=()) -> 'dict'",
    "list_recipes": "(card=None) -> 'dict'",
    "show_recipe": "(name) -> 'str'",
    "copy_recipe": "(name, out=None) -> 'str'",
    "doctor": "(folder='runs') -> 'dict'",
    "train": "(recipe: 'Recipe', resume=False, allow_change=()) -> 'RunDir'",
    "plan": "(recipe: 'Recipe', vram=None, card=None, plot=None) -> 'dict'",
    "list_cards": "() -> 'dict'",
    "plan_methods": "(recipe: 'Recipe', vram=None, card=None) -> 'dict'",
    "plan_processes": "(recipe: 'Recipe', count: 'int', vram=None, card=None, link=None) -> 'dict'",
    "inspect_data": "(recipe: 'Recipe', row=None, tokens=False, html=None) -> 'dict'",
    "evaluate": "(target, data_file=None, overrides=(), max_rows=None, **asked) -> 'dict'",
    "compare": "(path, overrides=(), resume=False, dry_run=False) -> 'dict'",
    "compare_runs": "(one, other, data=None) -> 'dict'",
    "compare_served": "(run, data=None, max_rows=None, forms=()) -> 'dict'",
    "export": "(target, out, dtype=None, overrides=(), *, model=None, data=None, compare_bases=False, gguf=None) -> 'dict'",
    "adapters": "(folder='runs') -> 'list'",
    "chat": "(target, prompt, system=None, max_new_tokens=512, overrides=(), on_text=None, *, adapters=None, adapter=None,"
    " **sampling) -> 'str'",
    "open": "(target, adapters=None, adapter=None, overrides=()) -> 'Routed'",
    "push": "(target, repo, *, public=False, base=None, license=None, dry_run=False) -> 'dict'",
    "report": "(targets, out=None) -> 'dict'",
    "quiet": "()",
    "heard_by": "(*listeners)",
}


def test_every_public_name_works_after_all_the_others(make_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make_recipe()
    (tmp_path / "mine.yaml").write_text(made.to_yaml())
    recipe = Recipe.load("mine.yaml", ["training.max_steps=3"])
    assert init(made.model.name_or_path, made.data.train[0].path, "4090", "small", "small.yaml")["plan"]["fits"]
    Path("axolotl.yml").write_text("base_model: x\nadapter: qlora\ndatasets: [{path: mine.jsonl}]\n")
    assert migrate("axolotl.yml", "migrated.yaml")["carried"]["base_model"] == "model.name_or_path"
    assert "quickstart" in [one["name"] for one in list_recipes()["recipes"]]
    assert show_recipe("quickstart") == Path(copy_recipe("quickstart")).read_text()
    assert doctor()["checks"][0]["name"] == "python"
    assert inspect_data(recipe)["rows"] > 0
    assert plan(recipe, "24GiB")["fits"]
    assert {one["method"] for one in plan_methods(recipe, "24GiB")["methods"]} >= {"lora", "full", "ia3"}
    shared = Recipe.load("mine.yaml", ["training.gradient_accumulation_steps=2"])
    assert plan_processes(shared, 2, card="4090")["fits"]
    assert {"RTX 4090", "T4"} <= {card["name"] for card in list_cards()["cards"]}
    heard = []
    with heard_by(heard.append):
        run = train(recipe)
    assert isinstance(run, RunDir)
    steps = [event for event in heard if isinstance(event, record.Step)]
    assert [(one.step, one.loss) for one in steps] == [
        (one.step, one.loss) for one in record.read(run) if isinstance(one, record.Step)
    ]
    assert len(steps) == 3
    assert set(evaluate(run.path)["metrics"]) == {"exact_match"}
    Path("compared.yaml").write_text("base: mine.yaml\nvariants: {mine: }\noutput_dir: compared\n")
    assert compare("compared.yaml", dry_run=True)["planned"][0]["fits"]
    assert compare_runs(run.path, run.path)["change"]["loss"]["value"] == 0
    assert [one["kl"] < 1e-3 for one in compare_served(run.path, max_rows=1, forms=["float16"])["forms"]] == [True]
    assert export(run.path, "models/mine")["verified"]
    assert isinstance(chat("models/mine", "What can you do?", max_new_tokens=4), str)
    with qlora.open(run.path, adapters={"again": run.path}) as model:
        assert model.answer("Hello!", max_new_tokens=4) == model.answers(["Hello!"], "again", max_new_tokens=4)[0]
    assert [one["state"] for one in adapters(run.path)] == ["finished"]
    assert report([run.path, "models/mine"], "mine.html")["runs"][0]["verdicts"][1]["answer"] == "yes"
    with quiet():
        assert push(run.path, "me/mine", base="me/base", dry_run=True)["url"] is None
    for name in qlora.__all__:  # every verb has imported what it needs, and none of that is where a function was
        namespace = {}
        exec(f"from qlora import {name}", namespace)
        assert namespace[name] is getattr(qlora, name)
        assert not inspect.ismodule(namespace[name]), name
        assert name[0].isupper() or inspect.isfunction(namespace[name]), name
    assert issubclass(InputError, qlora.QLoRAError)
    assert not set(qlora.__all__) - globals().keys() - ERRORS  # a new name is called here too


ERRORS = {"QLoRAError", "DoesNotFit", "ProofFailed", "TrainingFailed", "Interrupted"}


def test_every_public_function_is_documented_and_has_the_arguments_that_scripts_rely_on():
    public = {name: getattr(qlora, name) for name in [*qlora.__all__, "open"]}
    functions = {name: one for name, one in public.items() if inspect.isfunction(one)}
    assert {name: str(inspect.signature(function)) for name, function in functions.items()} == SIGNATURES
    for name, function in functions.items():
        assert len(inspect.getdoc(function)) > 80, name


@pytest.mark.parametrize("name", ["Recipe", "InputError", "quiet", "heard_by", "report"])
def test_what_computes_nothing_is_imported_without_torch(name):
    code = f"import sys; from qlora import {name}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = qlora.trian
