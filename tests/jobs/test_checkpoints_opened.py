"""eval and chat take a checkpoint of a run: it answers as it did then, and what it scores is never the run's own."""

import json
import shutil

import pytest
import torch

from qlora.commands.chat import chat
from qlora.commands.eval import evaluate
from qlora.commands.train import train
from qlora.jobs.opening.opened_model import open_subject
from qlora.jobs.opening.routed import open_routed
from qlora.runs.checkpoints import read_tensors
from qlora.system.errors import InputError
from tests.conftest import recipe_in

PROMPT = "What is 1 plus 2?"


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """Return a run of four steps with two checkpoints, made once."""
    settings = {"max_steps": 4, "save_steps": 2, "save_total_limit": 2}
    return train(recipe_in(tmp_path_factory.mktemp("kept"), tiny_model("llama"), {"training": settings}))


def test_a_checkpoint_is_opened_as_it_was_then(run):
    now, then = (open_subject(path).model.state_dict() for path in (run.path, run.checkpoints / "step-2"))
    kept = read_tensors(run.checkpoints / "step-2")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight"
    assert torch.equal(then[name], kept[f"weights/{name}"].to(then[name].dtype))
    assert not torch.equal(then[name], now[name])


def test_it_is_evaluated_on_the_rows_of_its_run_and_the_run_keeps_its_own_score(run):
    own = evaluate(run.path, max_rows=2)
    found = evaluate(run.checkpoints / "step-2", max_rows=2)
    last = evaluate(run.checkpoints / "step-4")
    assert found["before"]["loss"] == own["before"]["loss"]
    assert found["loss"] != own["loss"]
    assert not run.eval_file.exists()
    kept = {path.stem: json.loads(path.read_text())["loss"] for path in run.evals.glob("*.json")}
    assert kept == {
        "held-out-2-rows": own["loss"],
        "step-2-held-out-2-rows": found["loss"],
        "step-4-held-out": last["loss"],
    }
    assert last["loss"] == evaluate(run.path)["loss"]


def test_it_chats_alone_and_beside_its_run(run):
    early = run.checkpoints / "step-2"
    alone = chat(early, PROMPT, max_new_tokens=8)
    with open_routed(run.path, {"early": early}) as model:
        assert model.answer(PROMPT, "early", max_new_tokens=8) == alone
        assert model.answer(PROMPT, max_new_tokens=8) == chat(run.path, PROMPT, max_new_tokens=8)
        model.load("again", early)
        place = model.folder_of("again")
        assert place.is_dir()
    assert not place.exists()


def test_one_that_is_not_there_is_refused_with_those_that_are(run, tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint at .*step-3; .* has step-2, step-4"):
        chat(run.checkpoints / "step-3", PROMPT)
    copied = shutil.copytree(run.path, tmp_path / "copied")
    next((copied / "checkpoints" / "step-2").glob("*.safetensors")).write_bytes(b"x")
    with pytest.raises(InputError, match="step-2"):
        evaluate(copied / "checkpoints" / "step-2")
