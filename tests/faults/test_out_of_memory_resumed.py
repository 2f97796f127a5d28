"""Memory that runs out for good ends a run with a checkpoint; the run that goes on from it is the one that never ran out."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file
from trl import SFTTrainer

from qlora.commands.train import train
from qlora.system.errors import DoesNotFit
from qlora.training import reliable_trainer
from qlora.training.less_memory import Economy

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def recipe_of(make_recipe, tmp_path):
    """Return recipe_of(name, **training): four steps of two micro-batches of a row each, with dropout and an evaluation."""

    def make(name, **training):
        return make_recipe(
            lora={"r": 4, "lora_dropout": 0.2},
            training={"max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
                      "tokens_per_micro_batch": None, "save_steps": 100, "eval_steps": 2, "per_device_eval_batch_size": 1,
                      "neftune_noise_alpha": 5.0} | training,
            output_dir=str(tmp_path / name),
        )  # fmt: skip

    return make


def in_a_micro_batch(patch, after=6):
    """The second of step 3, and all that is tried instead. after: the rehearsal and five of them."""
    original, calls = SFTTrainer.training_step, iter(range(1000))

    def full(*args, **kwargs):
        if next(calls) >= after:
            raise FULL
        return original(*args, **kwargs)

    patch.setattr(SFTTrainer, "training_step", full)


def in_the_evaluation(patch):
    def full(*args, **kwargs):
        raise FULL

    patch.setattr(SFTTrainer, "prediction_step", full)


def before_the_optimizer(patch):
    def full(trainer):
        if trainer.state.global_step == 2:
            raise FULL

    patch.setattr(reliable_trainer, "room_for_a_step", full)


def in_the_optimizer(patch):
    from bitsandbytes.optim import AdamW

    original, calls = AdamW.update_step, []

    def full(self, *args, **kwargs):
        calls.append(args)
        tensors = len(self.param_groups[0]["params"]) + sum(len(g["params"]) for g in self.param_groups[1:])
        if len(calls) == 2 * tensors + 5:  # some weights of step 3 have changed by then
            raise FULL
        return original(self, *args, **kwargs)

    patch.setattr(AdamW, "update_step", full)


def found(run):
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    lines = [line for line in lines if "out_of_memory" not in line]
    measured = ("time", "tokens_per_second", "memory_bytes")
    return [{key: value for key, value in line.items() if key not in measured} for line in lines], load_file(
        run.adapter / "adapter_model.safetensors"
    )


@pytest.mark.slow
def test_a_run_that_memory_has_ended_goes_on_to_the_bit(recipe_of, monkeypatch, tmp_path):
    lines, weights = found(train(recipe_of("whole")))
    assert len([line for line in lines if "loss" in line]) == 4
    for fault, layers, every in (
        (in_a_micro_batch, 2, 100),
        (in_the_evaluation, 0, 100),
        (before_the_optimizer, 0, 100),
        (in_the_optimizer, 0, 1),  # half a step is not saved: the checkpoint is that of the step before
    ):
        recipe = recipe_of(fault.__name__, save_steps=every)
        with monkeypatch.context() as patch:
            fault(patch)
            with pytest.raises(DoesNotFit, match=r"out of memory in (the evaluation after )?step (2|3)") as caught:
                train(recipe)
        (folder,) = (tmp_path / fault.__name__ / "checkpoints").glob("step-2")
        assert "\n  resume after step 2 with:  qlora train " in str(caught.value)
        kept = json.loads((folder / "state.json").read_text())["less_memory"]
        assert (kept and kept["layers"]) == (layers or None)
        run = train(recipe, resume=True)
        then, now = found(run)
        assert then == lines, fault.__name__
        assert all(torch.equal(tensor, now[name]) for name, tensor in weights.items()), fault.__name__
        assert json.loads(run.memory_file.read_text())["checkpointed_layers"] == layers


def test_where_there_is_no_memory_for_a_checkpoint_the_message_is_the_same(recipe_of, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise FULL

    in_a_micro_batch(monkeypatch)
    monkeypatch.setattr(reliable_trainer.Reliable, "save", full)
    with pytest.raises(DoesNotFit, match="out of memory in step 3, micro-batch 2") as caught:
        train(recipe_of("run"))
    assert "resume after" not in str(caught.value)
    assert not [*(tmp_path / "run" / "checkpoints").glob("step-*")]


def test_what_is_lowered_for_the_reserve_is_kept_for_the_run_that_goes_on(recipe_of, monkeypatch, tmp_path):
    original, calls = Economy.keep_reserve, []

    def little(self, trainer, measured):
        self.reserve.limit_bytes = round(1.01 * measured) if not calls else None
        calls.append(measured)
        return original(self, trainer, measured)

    recipe = recipe_of("run")
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(Economy, "keep_reserve", little)
        in_a_micro_batch(patch, after=7)  # of which two are rehearsals
        stack.enter_context(pytest.raises(DoesNotFit))
        train(recipe)
    assert len(calls) == 2
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-2" / "state.json").read_text())
    assert state["less_memory"]["layers"] >= 1
    run = train(recipe, resume=True)
    assert json.loads(run.memory_file.read_text())["checkpointed_layers"] >= 1
