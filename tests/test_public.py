"""`from qlora import ...` as README has it: every public name, called in one process, one after another."""

import inspect

import qlora
from qlora import InputError, Recipe, RunDir, adapters, chat, evaluate, export, inspect_data, plan, push, train


def test_every_public_name_works_after_all_the_others(make_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make_recipe()
    (tmp_path / "mine.yaml").write_text(made.to_yaml())
    recipe = Recipe.load("mine.yaml", ["training.max_steps=3"])
    assert inspect_data(recipe)["rows"] > 0
    assert plan(recipe, "24GiB")["fits"]
    run = train(recipe)
    assert isinstance(run, RunDir)
    assert set(evaluate(run.path)["metrics"]) == {"exact_match"}
    assert export(run.path, "models/mine")["verified"]
    assert isinstance(chat("models/mine", "What can you do?", max_new_tokens=4), str)
    assert [one["state"] for one in adapters(run.path)] == ["finished"]
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
