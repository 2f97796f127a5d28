"""Training does what it says: the same numbers whatever saves memory, learning, and it stops rather than lies."""

from typing import get_args

import pytest
import torch

from qlora.recipe import Adalora, Lora, Training
from qlora.system.errors import TrainingFailed
from qlora.training.objectives import supervised
from tests.conftest import CONVERSATIONS, some_slow
from tests.runs.test_record import KEYS
from tests.training.conftest import UNEVEN, losses, records, trained


@pytest.mark.parametrize(
    "family", some_slow(["llama", "gpt2"], ["gpt2"])
)  # the others: tests/kernels/test_checkpointing.py
def test_checkpointing_changes_memory_not_gradients(fit, family):
    settings = {"family": family, "max_steps": 2, "lora": Lora(r=4, lora_dropout=0.1), "held_out": UNEVEN[:3],
                "gradient_accumulation_steps": 2, "eval_steps": 1}  # fmt: skip
    plain = fit(UNEVEN, **settings)
    for number, offload in ((1, False), (2, True)):
        other = fit(UNEVEN, checkpointed_layers=number, offload=offload, **settings)
        assert losses(other[2]) == losses(plain[2])
        for name, value in trained(plain[0]).items():
            assert torch.equal(value, trained(other[0])[name]), name


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(fit):
    lora = Lora(r=4, lora_dropout=0.1)
    one, same, other = (trained(fit(lora=lora, max_steps=3, seed=seed)[0]) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


OPTIMIZERS = get_args(Training.model_fields["optim"].annotation)


@pytest.mark.parametrize("optim", some_slow(OPTIMIZERS, but=("adamw_torch", "paged_adamw_8bit", "paged_lion_32bit")))
def test_every_optimizer_learns(fit, optim):
    learning_rate = 1e-3 if "lion" in optim else 1e-2
    _, _, run = fit(optim=optim, max_steps=8, learning_rate=learning_rate, per_device_train_batch_size=8)
    losses = [record["loss"] for record in records(run)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_default_optimizer_is_the_paged_8_bit_one(load_model, fit, monkeypatch):
    made = []
    original = supervised.Trainer.create_optimizer

    def spy(self, model=None):
        made.append(original(self, model))
        return made[-1]

    monkeypatch.setattr(supervised.Trainer, "create_optimizer", spy)
    fit(lora=Lora(r=32), max_steps=2)  # 32 x 128 = 4096 numbers (down_proj): the least that is kept in 8 bits
    optimizer = made[0]
    assert any(base.__module__.startswith("bitsandbytes") for base in type(optimizer).__mro__)
    assert optimizer.is_paged
    states = {state["state1"].dtype for state in optimizer.state.values()}
    assert torch.uint8 in states


@pytest.mark.parametrize("family", some_slow(["llama", "llama-tied", "gpt2"], but=["llama-tied"]))
def test_checkpointing_does_not_change_the_rows_of_new_tokens(fit, family):
    on, off = (fit(family=family, checkpointed_layers=k, token_ids=[1, 2])[0] for k in (2, 0))
    rows = {name: tensor for name, tensor in trained(off).items() if "trainable_tokens" in name}
    assert len(rows) == (2 if family == "llama" else 1)
    for name, tensor in rows.items():
        torch.testing.assert_close(trained(on)[name], tensor, atol=1e-3, rtol=1e-2)


def test_a_loss_that_is_never_finite_stops_the_run_with_the_weights_it_had(fit, load_model, monkeypatch):
    before = {}

    def poisoned(model, inputs, num_items, lean):
        loss = ORIGINAL(model, inputs, num_items)
        before.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        before["model"] = model
        return loss * float("nan")

    ORIGINAL = supervised.loss_of_trained_positions
    monkeypatch.setattr(supervised, "loss_of_trained_positions", poisoned)
    with pytest.raises(TrainingFailed, match=r"the loss is nan .* skipped: 3 consecutive steps had a non-finite loss"):
        fit(max_steps=9)
    model = before.pop("model")
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())


WARMUPS = [
    (*lengths, schedule)
    for lengths in ((1, 0.03, 0), (1, 0.9, 0), (2, 0.9, 1), (6, 0.5, 3), (4, 0.0, 0))
    for schedule in ("cosine", "linear", "constant_with_warmup")
]
TWO = [(2, 0.9, 1, "cosine"), (6, 0.5, 3, "linear")]


@pytest.mark.parametrize(("num_steps", "ratio", "warmup", "schedule"), some_slow(WARMUPS, but=TWO))
def test_a_warmup_starts_above_zero_and_is_never_the_whole_run(fit, num_steps, ratio, warmup, schedule):
    _, result, run = fit(
        max_steps=num_steps, warmup_ratio=ratio, lr_scheduler_type=schedule, learning_rate=1e-2, rehearse=False
    )
    assert result.steps == num_steps
    rates = [record["learning_rate"] for record in records(run) if "learning_rate" in record]
    # rates rise in equal steps to the full one, which the first step after the warmup has
    assert rates[: warmup + 1] == pytest.approx([1e-2 * (step + 1) / (warmup + 1) for step in range(warmup + 1)])
    assert all(0 < rate <= 1e-2 for rate in rates)


def test_no_limit_on_the_norm_is_no_clipping(fit):
    runs = {limit: fit(max_steps=2, max_grad_norm=limit, optim="adamw_torch") for limit in (None, 0, 1e6, 1e-3)}
    weights = {limit: trained(model) for limit, (model, _, _) in runs.items()}
    norms = [record["grad_norm"] for record in records(runs[None][2]) if "grad_norm" in record]
    assert norms
    assert min(norms) > 1e-3  # so that the last one is clipped
    for unlimited in (0, 1e6):
        assert all(torch.equal(tensor, weights[unlimited][name]) for name, tensor in weights[None].items())
    assert not all(torch.equal(tensor, weights[1e-3][name]) for name, tensor in weights[None].items())


ADALORA = Adalora(lora_alpha=64, init_r=6, target_r=3, tinit=1, tfinal=2)


DORA = Lora(r=4, use_dora=True, modules_to_save=["embed_tokens", "lm_head"])


@pytest.mark.parametrize("lora", [ADALORA, pytest.param(DORA, marks=pytest.mark.slow)])
def test_checkpointing_does_not_change_what_other_kinds_learn(fit, lora):
    plain, checkpointed = (fit(lora=lora, max_steps=4, checkpointed_layers=k) for k in (0, 2))
    assert [r["loss"] for r in records(plain[2])] == [r["loss"] for r in records(checkpointed[2])]


def test_metrics_have_the_stable_keys_and_tensorboard_the_same_numbers(fit):
    _, result, run = fit(max_steps=2, held_out=CONVERSATIONS[:2], eval_steps=1)
    training = [record for record in records(run) if "loss" in record]
    assert all(record.keys() == set(KEYS) for record in training)
    assert [record["step"] for record in training] == [1, 2]
    assert training[-1]["tokens"] == result.tokens
    assert [r["eval_loss"] for r in records(run) if "eval_loss" in r][-1] == result.eval_loss

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([record["loss"] for record in training])
