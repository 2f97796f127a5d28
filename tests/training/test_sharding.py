"""Two processes that share the base train what one does, with half of the codes each."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from qlora import base_model, train
from qlora.commands.export import export
from qlora.recipe import Model, Quantization
from qlora.runs.checkpoints import read_tensors
from qlora.system.errors import InputError
from qlora.training import processes, sharding
from qlora.training.saving import save_unfinished
from tests.training.test_processes import (
    ENDLESS,
    FLOAT32,
    ROUNDING,
    STEPS,
    Started,
    ends_when_the_other_is_killed,
    losses,
    written,
)

# 18 rows are 9 micro-batches, of which the third step has one; 6 held-out rows are 3 batches: one process has one more
ODD = {"tokens_per_micro_batch": None, "per_device_eval_batch_size": 2, "eval_steps": 3, "num_samples": 2}


def shared(recipe, sharding="fsdp"):
    return recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"sharding": sharding})})


def trained_by_two(recipe, folder, name, *arguments, sharding="fsdp"):
    file, run = written(shared(recipe, sharding), folder, name)
    ended = Started(file, *arguments).finish()
    assert [code for code, *_ in ended] == [0, 0], ended
    return run


@pytest.mark.parametrize(
    ("training", "quantization", "rounding"),
    [
        (ODD, FLOAT32, ROUNDING),
        pytest.param({"eval_steps": 3}, FLOAT32, ROUNDING, marks=pytest.mark.slow),  # joined rows
        pytest.param({"eval_steps": 3}, {"compute_dtype": "bfloat16"}, 5e-3, marks=pytest.mark.slow),  # 8 bits
    ],
)
def test_two_processes_that_share_the_base_train_what_one_does(make_recipe, tmp_path, training, quantization, rounding):
    training = {**STEPS, "logging_steps": 1, **training}
    recipe = make_recipe(training=training, quantization=quantization, memory={"gradient_checkpointing": 1})
    run = train(recipe.model_copy(update={"output_dir": str(tmp_path / "alone")}))
    both = trained_by_two(recipe, tmp_path, "two")
    for ours, theirs in zip(losses(both), losses(run), strict=True):
        assert ours == pytest.approx(theirs, abs=rounding)
    assert len(losses(both)[0]) == 3
    ours, theirs = both.environment()["base_model"], run.environment()["base_model"]
    assert ours["quantized_sha256"] == theirs["quantized_sha256"]
    assert sorted(path.name for path in both.adapter.iterdir()) == sorted(path.name for path in run.adapter.iterdir())
    memory = [json.loads(one.memory_file.read_text()) for one in (both, run)]  # of the first of two
    ours, theirs = (one["measured_components"] for one in memory)
    rounded = 2 if quantization["compute_dtype"] == "bfloat16" else 4
    half = pytest.approx((rounded + 2) / (rounded + 4) * theirs["adapter"], rel=0.02)
    assert ours["adapter"] == half  # all of the weights, half of the masters
    assert ours["optimizer"] == pytest.approx(theirs["optimizer"] / 2, rel=0.05)
    for name in ("adapter", "optimizer"):
        assert memory[0]["predicted_components"][name] == pytest.approx(ours[name], rel=0.05)


def test_a_process_holds_half_of_the_codes(tiny_model):
    section = Model(name_or_path=str(tiny_model("llama")))
    whole, *halves = (
        base_model.quantized_modules(base_model.load(base_model.find(section), section, Quantization(), share=share))
        for share in (None, base_model.Share(0, 2), base_model.Share(1, 2))
    )
    assert len(whole) == 14
    for name, module in whole.items():
        parts = [half[name].weight.data for half in halves]
        assert torch.equal(torch.cat(parts), module.weight.data)
        for part, half in zip(parts, halves, strict=True):
            assert 2 * part.untyped_storage().nbytes() == module.weight.data.numel()
            assert half[name].digest_of_codes == base_model.digest(module.weight.data)


@pytest.mark.slow
def test_one_process_goes_on_from_two_whose_shares_were_offloaded_and_its_export_is_proven(make_recipe, tmp_path):
    steps = {**STEPS, "logging_steps": 1, "lr_scheduler_type": "constant", "save_steps": 2, "max_steps": 2}
    recipe = make_recipe(training=steps, quantization=FLOAT32)
    run = trained_by_two(recipe, tmp_path, "two", sharding="fsdp_offload")
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 4})})
    alone = train(longer.model_copy(update={"output_dir": str(tmp_path / "alone")}))
    there = longer.model_copy(update={"output_dir": str(run.path)})
    train(there, resume=True, allow_change=["training.max_steps"])
    assert losses(run)[0] == pytest.approx(losses(alone)[0], abs=ROUNDING)
    assert len(losses(run)[0]) == 4
    ours, theirs = (read_tensors(one.checkpoints / "step-2") for one in (run, alone))
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in ours.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in theirs.items()
    }
    assert export(run.path, tmp_path / "model")["verified"]


@pytest.mark.slow
def test_two_that_share_go_on_from_one(make_recipe, tmp_path):
    steps = {**STEPS, "logging_steps": 1, "lr_scheduler_type": "constant", "save_steps": 2, "max_steps": 2}
    recipe = make_recipe(training=steps, quantization=FLOAT32)
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 4})})
    alone = train(longer.model_copy(update={"output_dir": str(tmp_path / "alone")}))
    train(recipe.model_copy(update={"output_dir": str(tmp_path / "two")}))
    run = trained_by_two(longer, tmp_path, "two", "--resume", "--allow-change", "training.max_steps")
    assert losses(run)[0] == pytest.approx(losses(alone)[0], abs=ROUNDING)
    assert export(run.path, tmp_path / "model")["verified"]


@pytest.mark.slow
def test_three_hold_shares_of_unequal_size(make_recipe, tmp_path):
    steps = {**STEPS, "gradient_accumulation_steps": 6, "eval_steps": 3, "logging_steps": 1}
    recipe = make_recipe(training=steps, quantization=FLOAT32)
    run = train(recipe.model_copy(update={"output_dir": str(tmp_path / "alone")}))
    file, three = written(shared(recipe), tmp_path, "three")
    assert [code for code, *_ in Started(file, count=3).finish()] == [0] * 3
    for ours, theirs in zip(losses(three), losses(run), strict=True):
        assert ours == pytest.approx(theirs, abs=ROUNDING)


def test_when_one_that_holds_a_share_is_killed_the_other_ends_with_one_message(make_recipe, tmp_path):
    ends_when_the_other_is_killed(shared(make_recipe(training=ENDLESS)), tmp_path)


@pytest.mark.slow
def test_the_best_evaluation_is_loaded_by_both(make_recipe, tmp_path):
    best = {"eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.3, "max_steps": 2}
    recipe = make_recipe(training={**STEPS, "lr_scheduler_type": "constant", **best}, quantization=FLOAT32)
    run = train(recipe.model_copy(update={"output_dir": str(tmp_path / "alone")}))
    both = trained_by_two(recipe, tmp_path, "two")
    ours, theirs = (load_file(one.adapter / "adapter_model.safetensors") for one in (both, run))
    assert losses(run)[1][1] > losses(run)[1][0]  # so that there is something to load
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor == pytest.approx(theirs[name], abs=0.02), name


@pytest.mark.slow
def test_more_processes_than_trained_tensors(make_recipe, tmp_path):
    lora = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    steps = {**STEPS, "gradient_accumulation_steps": 6, "eval_steps": 3, "logging_steps": 1, "save_steps": 3}
    recipe = make_recipe(training=steps, quantization=FLOAT32, lora=lora)
    run = train(recipe.model_copy(update={"output_dir": str(tmp_path / "alone")}))
    file, three = written(shared(recipe), tmp_path, "three")
    ended = Started(file, count=3).finish()
    assert [code for code, *_ in ended] == [0] * 3, ended
    for ours, theirs in zip(losses(three), losses(run), strict=True):
        assert ours == pytest.approx(theirs, abs=ROUNDING)
    ours, theirs = (read_tensors(one.checkpoints / "step-3") for one in (three, run))
    assert ours.keys() == theirs.keys()


def test_steps_are_skipped_in_both_and_a_training_that_goes_wrong_ends_with_one_message(make_recipe, tmp_path):
    steps = {**STEPS, "max_steps": 30, "learning_rate": 1000, "lr_scheduler_type": "constant", "logging_steps": 1}
    recipe = make_recipe(training=steps, quantization={"compute_dtype": "float16"})
    file, both = written(shared(recipe), tmp_path, "two")
    ended = Started(file).finish()
    assert [code for code, *_ in ended] == [1, 1], ended
    assert sum("training.learning_rate" in err for *_, err in ended) == 1, ended
    assert '"rows": [' in both.metrics_file.read_text()  # steps that were skipped


def test_no_checkpoint_is_begun_when_memory_runs_out_in_one_that_holds_some_of_the_masters():
    trainer = SimpleNamespace(saved_step=1, state=SimpleNamespace(global_step=2), begun=True, changes_weights=False)
    trainer.saving, trainer.moment, trainer.take_back = SimpleNamespace(to=True), SimpleNamespace(evaluates=False), None
    saved = []
    trainer.save = lambda: saved.append(trainer.state.global_step)
    for sharded in (True, False):  # others would wait for it with theirs
        trainer.processes = processes.Processes(0, 2, sharded=sharded)
        save_unfinished(trainer)
    assert saved == [2]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization": None}, "quantization: null.*set a quantization"),
        ({"lora": {"use_dora": True}}, r"use_dora.*set lora\.use_dora=false"),
        ({"lora": {"init_lora_weights": "loftq"}}, "init_lora_weights=loftq.*=true"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "modules_to_save"),
        ({"lora": {"bias": "all"}}, r"lora\.bias=all"),
    ],
)
def test_what_reads_whole_weights_is_refused_by_name(make_recipe, fields, said):
    with pytest.raises(InputError, match=f"memory.sharding: fsdp does not go with .*{said}"):
        sharding.refuse_unsupported(make_recipe(memory={"sharding": "fsdp"}, **fields), True)


def test_one_process_is_told_how_to_start_several(make_recipe):
    with pytest.raises(InputError, match=r"several processes.*torchrun --nproc_per_node 2 -m qlora train"):
        train(make_recipe(memory={"sharding": "fsdp"}))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_cards_that_share_the_base_train_what_they_do_with_the_whole_base(make_recipe, tmp_path):
    recipe = make_recipe(training={**STEPS, **ODD, "logging_steps": 1}, memory={"gradient_checkpointing": 1})
    file, whole = written(recipe, tmp_path, "whole")
    assert [code for code, *_ in Started(file).finish()] == [0, 0]
    both = trained_by_two(recipe, tmp_path, "two")
    for ours, theirs in zip(losses(both), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)  # the same operations
