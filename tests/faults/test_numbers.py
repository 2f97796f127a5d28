"""Losses and gradients that are not finite, and runs that diverge."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from qlora.commands.train import train
from qlora.recipe import Quantization, Recipe
from qlora.system.errors import InputError, TrainingFailed
from qlora.training import loss_scale
from qlora.training.divergence import Watch
from qlora.training.master_weights import MasterWeights
from qlora.training.objectives import supervised
from tests.conftest import CONVERSATIONS, messages, write_jsonl

pytestmark = pytest.mark.usefixtures("unplanned")

EACH_STEP = {"save_steps": 1, "save_total_limit": None, "per_device_train_batch_size": 1, "logging_steps": 1}


@pytest.fixture
def overflowing(make_recipe, tokenizer, tmp_path, monkeypatch):
    """Return make(rows, held_out=(), value=nan, **training) -> a Recipe whose rows of these numbers, from 1, have this loss.

    value: None for a loss that is finite, with a gradient that is not.
    """
    (token,) = tokenizer("@", add_special_tokens=False).input_ids
    original = supervised.loss_of_trained_positions

    def make(rows, held_out=(), value=math.nan, **training):
        def overflow(model, inputs, *rest):
            loss = original(model, inputs, *rest)
            if not (inputs["input_ids"] == token).any():
                return loss
            if value is None:
                loss.register_hook(lambda gradient: gradient * math.inf)
            return loss if value is None else loss * value

        monkeypatch.setattr(supervised, "loss_of_trained_positions", overflow)
        files = {}
        for kind, broken in (("train", rows), ("eval", held_out)):
            turns = [[(role, text + " @" * (number in broken)) for role, text in conversation]
                     for number, conversation in enumerate(CONVERSATIONS[:12], start=1)]  # fmt: skip
            files[kind] = str(write_jsonl(tmp_path / f"{kind}.jsonl", [{"messages": messages(t)} for t in turns]))
        return make_recipe(
            data={"train": files["train"], "eval": files["eval"] if held_out else None, "eval_fraction": 0.0},
            training={"max_steps": 12, **EACH_STEP, **training},
        )

    return make


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step}" / "tensors.safetensors")


@pytest.mark.parametrize(
    ("optim", "value"), [("paged_adamw_8bit", math.nan), ("adamw_torch", None), ("paged_lion_8bit", math.inf)]
)
def test_a_step_that_is_not_finite_is_not_taken_and_the_run_goes_on(overflowing, tmp_path, optim, value):
    train(overflowing({5}, value=value, optim=optim))
    found = records(tmp_path / "run")
    (left_out,) = [record for record in found if "not_taken" in record]
    assert left_out["rows"] == [5]
    step = left_out["step"]
    taken = [record for record in found if "loss" in record]
    assert [record["step"] for record in taken] == [number for number in range(1, 13) if number != step]
    assert all(math.isfinite(record[key]) and record[key] > 0 for record in taken for key in ("loss", "grad_norm"))
    before, after = saved(tmp_path / "run", step - 1), saved(tmp_path / "run", step)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    last = saved(tmp_path / "run", 12)
    assert all(torch.isfinite(tensor).all() for tensor in last.values() if tensor.is_floating_point())
    assert any(not torch.equal(last[name], after[name]) for name in after)


def test_the_mean_loss_is_that_of_the_steps_that_were_taken(overflowing, tmp_path, capsys):
    train(overflowing({5, 9}, logging_steps=4))
    found = records(tmp_path / "run")
    gone = {record["step"] for record in found if "not_taken" in record}
    assert len(gone) == 2
    train(overflowing({5, 9}, logging_steps=1).model_copy(update={"output_dir": str(tmp_path / "other")}))
    each = {record["step"]: record["loss"] for record in records(tmp_path / "other") if "loss" in record}
    for record in found:
        if "loss" in record:
            window = [each[step] for step in range(record["step"] - 3, record["step"] + 1) if step not in gone]
            assert record["loss"] == pytest.approx(sum(window) / len(window), rel=1e-6)
    said = capsys.readouterr().err
    assert f"loss {sum(each.values()) / len(each):.4f}" in said
    assert said.count("skipped: the loss is nan with training row") == 4


def test_rows_are_named_as_far_as_they_are_known(overflowing, tmp_path):
    train(overflowing({5}, value=None, gradient_accumulation_steps=3, max_steps=4))
    (left_out,) = [record for record in records(tmp_path / "run") if "not_taken" in record]
    assert len(left_out["rows"]) == 3  # a gradient is a sum: one of these it was
    assert 5 in left_out["rows"]
    train(
        overflowing({5}, gradient_accumulation_steps=3, max_steps=4).model_copy(
            update={"output_dir": str(tmp_path / "b")}
        )
    )
    (left_out,) = [record for record in records(tmp_path / "b") if "not_taken" in record]
    assert left_out["rows"] == [5]  # a loss is that of its micro-batch


def test_a_few_in_a_row_end_the_run_with_a_checkpoint_of_finite_numbers(overflowing, tmp_path):
    recipe = overflowing(set(range(1, 13)), save_steps=100)
    pattern = (
        r"the loss is nan with training row \d+ in step 3; skipped: 3 consecutive steps had a non-finite loss or "
        r"gradient\. Lower training.learning_rate, or look at these rows: .*; resume after step 3 with:  qlora train .* --resume"
    )
    with pytest.raises(TrainingFailed, match=pattern):
        train(recipe)
    run = tmp_path / "run"
    assert not (run / "adapter").exists()
    assert [record["step"] for record in records(run)] == [1, 2, 3]
    assert all(torch.isfinite(t).all() for t in saved(run, 3).values() if t.is_floating_point())
    with pytest.raises(TrainingFailed, match="in step 6"):
        train(recipe, resume=True)
    # the rows changed, which is another run unless it is allowed; then it goes on to its end
    mended = overflowing(set(), save_steps=100)
    with pytest.raises(InputError, match="data: "):
        train(mended, resume=True)
    allowed = ("data", "rows")
    train(mended, resume=True, allow_change=allowed)
    assert records(run)[-1]["step"] == 12
    assert (run / "adapter").is_dir()


def test_an_evaluation_that_a_failing_step_leaves_is_made_up_for(overflowing, tmp_path):
    recipe = overflowing(set(range(1, 13)), {99}, eval_steps=3, save_steps=100)
    for resume, evaluated in ((False, []), (True, [3])):
        with pytest.raises(TrainingFailed, match="skipped: 3 consecutive steps"):
            train(recipe, resume=resume)
        assert [record["step"] for record in records(tmp_path / "run") if "eval_loss" in record] == evaluated


def test_a_run_of_which_no_step_was_taken_makes_no_adapter(overflowing, tmp_path):
    with pytest.raises(TrainingFailed, match=r"every step was skipped .* look at the rows listed in .*metrics.jsonl"):
        train(overflowing(set(range(1, 13)), max_steps=2))
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_held_out_row_whose_loss_is_not_finite_is_named(overflowing, tmp_path):
    recipe = overflowing(set(), {4}, math.inf, eval_steps=3, per_device_eval_batch_size=1, save_steps=100)
    with pytest.raises(TrainingFailed, match="the loss is inf in the evaluation after step 3, with held-out row 4: "):
        train(recipe)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-3"]
    assert not any("eval_loss" in record for record in records(tmp_path / "run"))


def test_weights_that_overflow_in_the_last_step_are_not_saved(make_recipe, tmp_path, monkeypatch):
    original = MasterWeights.clear_gradients

    def overflow(self):
        original(self)
        self.masters[0].data[0, 0] = math.inf

    monkeypatch.setattr(MasterWeights, "clear_gradients", overflow)
    recipe = make_recipe(training={"max_steps": 1, "save_steps": None})
    with pytest.raises(TrainingFailed, match=r"weights/.* contains non-finite values after step 1; it was not saved"):
        train(recipe)
    assert not (tmp_path / "run" / "adapter").exists()


IN_BFLOAT16 = {"compute_dtype": "bfloat16"}  # on every processor: in float32 other rates diverge
DIVERGES = {"learning_rate": 30.0, "max_steps": 40, "warmup_ratio": 0.3, "watchdog_steps": 8, "save_steps": 3}


def test_a_run_that_diverges_is_paused_and_its_last_good_checkpoint_kept(make_recipe, tmp_path):
    recipe = make_recipe(
        training={**DIVERGES, "logging_steps": 1}, data={"eval_fraction": 0.0}, quantization=IN_BFLOAT16
    )
    with pytest.raises(TrainingFailed, match=r"the loss has diverged: the median of the last 8 steps is") as caught:
        train(recipe)
    run = tmp_path / "run"
    losses = [record["loss"] for record in records(run)]
    assert len(losses) < 40
    kept = [path.name.removeprefix("step-") for path in (run / "checkpoints").iterdir()]
    steps = sorted(int(name) for name in kept if name.isdigit())
    assert all(name.partition(".")[2] in {"", "diverged-1"} for name in kept)
    assert f"resume after step {steps[-1]} with:  qlora train {run}/recipe.yaml --resume" in str(caught.value)
    assert steps[-1] <= len(losses) - 3  # another was due since, when the loss was high already
    assert max(losses[steps[-1] - 2 : steps[-1]]) < losses[-1]
    assert not (run / "adapter").exists()
    # at the rate that the message asks for, the run ends well
    calmer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"learning_rate": 0.01})})
    train(calmer, resume=True, allow_change=("training.learning_rate",))
    assert records(run)[-1]["step"] == 40


@pytest.mark.slow
def test_without_the_watchdog_it_goes_on(make_recipe, tmp_path):
    train(
        make_recipe(
            training={**DIVERGES, "watchdog_steps": None}, data={"eval_fraction": 0.0}, quantization=IN_BFLOAT16
        )
    )
    assert records(tmp_path / "run")[-1]["step"] == 40


def test_a_checkpoint_is_not_put_off_for_ever(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Watch, "suspects", lambda self: True)
    settings = {"max_steps": 16, "save_steps": 3, "watchdog_steps": 4, "save_total_limit": None}
    train(make_recipe(training=settings))
    kept = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [7, 13, 16]  # due in 3 and 9, and the last


FLOAT16 = {"compute_dtype": "float16"}


def test_in_float16_a_row_without_a_finite_loss_is_named_and_not_taken_for_an_overflow(overflowing, tmp_path):
    train(overflowing({5}).model_copy(update={"quantization": Quantization(**FLOAT16)}))
    found = records(tmp_path / "run")
    (left_out,) = [record for record in found if "not_taken" in record]
    assert left_out["rows"] == [5]
    after = [record["loss_scale"] for record in found if record["step"] > left_out["step"]]
    before = [record["loss_scale"] for record in found if record["step"] < left_out["step"]]
    assert after[0] == (before or [2.0**16])[-1]


def test_in_float16_losses_that_are_not_finite_end_the_run_with_the_dtype_to_set(overflowing, tmp_path):
    with pytest.raises(TrainingFailed) as caught:
        train(overflowing(range(1, 13)).model_copy(update={"quantization": Quantization(**FLOAT16)}))
    assert "3 consecutive steps had a non-finite loss" in str(caught.value)
    assert "Set quantization.compute_dtype=float32, because float16 ends at 65,504" in str(caught.value)
    assert "--resume quantization.compute_dtype=float32 --allow-change quantization.compute_dtype" in str(caught.value)


def test_a_gradient_that_is_not_finite_at_the_lowest_scale_ends_the_run_and_names_its_rows(
    overflowing, tmp_path, monkeypatch
):
    monkeypatch.setattr(loss_scale, "INITIAL", 4.0)
    with pytest.raises(
        TrainingFailed, match=r"the gradient is (inf|nan) with training row \d+ in step 3, though"
    ) as caught:
        train(overflowing(range(1, 13), value=None).model_copy(update={"quantization": Quantization(**FLOAT16)}))
    assert "lowest, 1. Set quantization.compute_dtype=float32" in str(caught.value)
    found = records(tmp_path / "run")
    assert [record.get("loss_scale") for record in found] == [2.0, 1.0, None]


def test_a_run_in_float16_goes_on_in_float32_where_that_is_allowed(overflowing, tmp_path):
    recipe = overflowing((), max_steps=2).model_copy(update={"quantization": Quantization(**FLOAT16)})
    train(recipe)
    longer = Recipe.from_dict(recipe.model_dump(), ["training.max_steps=3"])
    full = Recipe.from_dict(longer.model_dump(), ["quantization.compute_dtype=float32"])
    with pytest.raises(InputError, match=r'quantization\.compute_dtype: was "float16", is "float32"'):
        train(full, resume=True)
    run = train(full, resume=True, allow_change=["quantization.compute_dtype"])
    assert records(tmp_path / "run")[-1]["step"] == 3
    assert run.environment()["compute_dtype"] == "float32"
