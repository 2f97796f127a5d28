"""A card or processor without bfloat16, pretended: what is chosen is said, kept, used by every verb, not changed by a resume."""

import json
from types import SimpleNamespace

import pytest
import torch

from qlora import base_model
from qlora.base_model import compute_dtype
from qlora.base_model.compute_dtype import Computer
from qlora.commands.chat import chat
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.plan import plan
from qlora.commands.train import train
from qlora.jobs.exporting import served_forms
from qlora.jobs.opening.opened_adapter import open_trained
from qlora.jobs.opening.opened_model import open_subject
from qlora.recipe import Quantization, Recipe
from qlora.system.errors import InputError
from tests.training.conftest import records

GiB = 2**30


@pytest.fixture
def on_a_t4(monkeypatch):
    """Return pretend(old=True): whether this machine computes in bfloat16."""

    def pretend(old=True):
        def computer(device):
            return Computer("Tesla T4", False) if old else Computer("RTX 4090", True)

        monkeypatch.setattr(compute_dtype, "computer", computer)
        monkeypatch.setattr(base_model, "computer", computer)

    pretend()
    return pretend


@pytest.mark.usefixtures("unplanned")
def test_the_whole_way_in_float16(make_recipe, on_a_t4, tmp_path, capsys):
    recipe = make_recipe(training={"max_steps": 4, "save_steps": 2})
    run = train(recipe)
    said = capsys.readouterr().err
    assert "dtype     computes in float16: the Tesla T4 has no bfloat16" in said
    assert "in nf4, computing in float16, on cpu" in said
    assert run.recipe().quantization.compute_dtype == "float16"
    assert run.environment()["compute_dtype"] == "float16"
    assert [line["loss_scale"] for line in records(run) if "loss" in line]

    on_a_t4(False)  # what was trained in float16 answers in float16 everywhere
    subject = open_subject(run.path)
    assert {p.dtype for p in subject.model.parameters() if p.is_floating_point()} == {torch.float16}
    found = evaluate(run.path)
    assert found["loss"] < found["before"]["loss"]
    assert isinstance(chat(run.path, "What is 1 plus 1?", max_new_tokens=4), str)
    for mode in ("full", "layers"):
        report = export(run.path, tmp_path / mode, overrides=[f"export.verify={mode}"])
        assert report["verified"]
        assert report["merged"]["kl"] < 1e-4 < report["base_model"]["kl"]

    longer = Recipe.from_dict(recipe.model_dump(), ["training.max_steps=5"])
    with pytest.raises(InputError, match=r'quantization\.compute_dtype: was "float16", is "bfloat16"'):
        train(longer, resume=True)
    on_a_t4()
    assert records(train(longer, resume=True))[-1]["step"] == 5


def test_the_whole_way_on_a_processor_without_bfloat16(make_recipe, monkeypatch, tmp_path, capsys):
    for owner in (compute_dtype, base_model):
        monkeypatch.setattr(owner, "computer", lambda device: Computer("processor", False, is_gpu=False))
    run = train(make_recipe(training={"max_steps": 3}))
    said = capsys.readouterr().err
    assert "dtype     computes in float32: the processor has no instructions for bfloat16" in said
    assert run.recipe().quantization.compute_dtype == run.environment()["compute_dtype"] == "float32"
    memory = json.loads(run.memory_file.read_text())
    assert memory["predicted_components"]["adapter"] == memory["measured_components"]["adapter"]
    assert evaluate(run.path)["loss"] > 0
    assert export(run.path, tmp_path / "out")["verified"]
    for target in (run.path, tmp_path / "out"):  # a plain folder too
        floating = {p.dtype for p in open_subject(target).model.parameters() if p.is_floating_point()}
        assert floating == {torch.float32}


@pytest.mark.usefixtures("unplanned", "on_a_t4")
def test_a_run_without_quantization_is_served_in_nf4_in_what_the_card_has(make_recipe, tmp_path):
    run = train(make_recipe(quantization=None, training={"max_steps": 2}))
    export(run.path, tmp_path / "out")

    def dtypes(model, *_):
        return {p.dtype for p in model.parameters() if p.is_floating_point()}

    with open_trained([run.path]) as trained:
        job = SimpleNamespace(trained=trained, device=torch.device("cpu"), measured=dtypes)
        assert served_forms._nf4(job, tmp_path / "out", tmp_path) == {torch.float16}


@pytest.mark.slow
@pytest.mark.usefixtures("unplanned")
def test_a_base_without_quantization_has_its_dtype_too(make_recipe, on_a_t4, tmp_path):
    recipe = make_recipe(quantization=None, training={"max_steps": 3, "save_steps": 2})
    run = train(recipe)
    assert run.recipe().model.dtype == run.environment()["compute_dtype"] == "float16"
    assert export(run.path, tmp_path / "out")["verified"]
    longer = Recipe.from_dict(recipe.model_dump(), ["training.max_steps=4"])
    on_a_t4(False)
    with pytest.raises(InputError, match=r'model\.dtype: was "float16", is "bfloat16"'):
        train(longer, resume=True)
    same = Recipe.from_dict(longer.model_dump(), ["model.dtype=float16"])
    assert records(train(same, resume=True))[-1]["step"] == 4


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("quantization", [Quantization(), None])
def test_a_run_of_before_there_was_a_choice_goes_on(make_recipe, on_a_t4, monkeypatch, quantization):
    from qlora.jobs.opening import resumed_run

    on_a_t4(False)
    values = quantization and quantization.model_dump()
    recipe = make_recipe(quantization=values, training={"max_steps": 2, "save_steps": 2})
    original = resumed_run.of_recipe
    with monkeypatch.context() as patch:  # their fingerprint has no model.dtype
        patch.setattr(
            resumed_run, "of_recipe", lambda *a: {k: v for k, v in original(*a).items() if k != "model.dtype"}
        )
        train(recipe)
    longer = Recipe.from_dict(recipe.model_dump(), ["training.max_steps=3"])
    on_a_t4()
    with pytest.raises(InputError, match=r'dtype: was "bfloat16", is "float16"'):
        train(longer, resume=True)
    on_a_t4(False)
    assert records(train(longer, resume=True))[-1]["step"] == 3


@pytest.mark.usefixtures("on_a_t4")
def test_a_family_that_overflows_float16_computes_in_float32(tiny_model):
    subject = open_subject(str(tiny_model("gemma2")))
    assert next(subject.model.parameters()).dtype == torch.float32
    assert next(open_subject(str(tiny_model())).model.parameters()).dtype == torch.float16


def test_an_old_card_is_planned_in_float16(make_recipe, capsys):
    recipe = make_recipe(data={"max_length": 256})
    found = plan(recipe, card="T4")
    assert "computes in float16: the T4 has no bfloat16" in capsys.readouterr().err
    bfloat16 = plan(recipe, card="4090")
    assert found["components"]["weights"] == bfloat16["components"]["weights"]
    # memory-efficient attention gets a copy of keys and values for each query head
    assert found["components"]["layer_work"] > bfloat16["components"]["layer_work"]
