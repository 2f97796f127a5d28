"""Trainings in float16: near those in bfloat16 and float32, and whole whatever overflows."""

import pytest
import torch

from qlora import methods
from qlora.recipe import Quantization
from qlora.runs import record
from qlora.system.errors import TrainingFailed
from qlora.training import loss_scale
from qlora.training.loss_scale import LossScale
from qlora.training.master_weights import MasterWeights
from tests.training.conftest import UNEVEN, records

FLOAT16 = Quantization(compute_dtype="float16")
SETTINGS = {"max_steps": 8, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 2e-3}


def steps(run):
    return [line["loss"] for line in records(run) if "loss" in line]


def test_the_policy_is_that_of_torchs_grad_scaler(monkeypatch):
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    theirs, ours = torch.amp.GradScaler("cpu", growth_interval=3), LossScale()
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    assert theirs.get_growth_factor() == loss_scale.GROWTH
    assert theirs.get_backoff_factor() == loss_scale.BACKOFF
    for value in (1, 1, 1, 1, float("inf"), 1, 1, float("nan"), float("inf"), 1, 1, 1, 1):
        theirs.scale(weight.sum())
        weight.grad = torch.full((1,), float(value))
        theirs.step(optimizer)
        theirs.update()
        ours.took() if value == 1 else ours.fell()
        assert ours.scale == theirs.get_scale()
    assert ours.overflows == 3


def test_the_scale_has_a_floor_and_a_ceiling(monkeypatch):
    monkeypatch.setattr(loss_scale, "INTERVAL", 1)
    scale = LossScale()
    for _ in range(40):
        scale.took()
    assert scale.scale == 2.0**24
    assert [scale.fell() for _ in range(30)] == [True] * 24 + [False] * 6
    assert scale.scale == 1


def test_float16_learns_as_bfloat16_and_float32_do(fit, monkeypatch):
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**12)
    runs = {name: fit(quantization=Quantization(compute_dtype=name), **SETTINGS)
            for name in ("float16", "bfloat16", "float32")}  # fmt: skip
    model = runs["float16"][0]
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float16}
    half, brain, full = (steps(run) for _, _, run in runs.values())
    assert len(half) == 8
    # float16 has 3 bits more than bfloat16
    assert half == pytest.approx(full, rel=2e-3)
    assert half == pytest.approx(brain, rel=1e-2)
    assert half[-1] < half[0] - 1


def test_a_gradient_that_float16_cannot_hold_reaches_the_masters_exactly():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    for scale, found in ((LossScale(), 2.0**-30), (None, 0.0)):
        masters = MasterWeights([parameter])
        loss = (parameter.float() * 2.0**-30).sum()  # the smallest number of float16 is 2**-24
        if scale is not None:
            scale.apply(loss)
        loss.backward()
        assert loss.item() == 3 * 2.0**-30
        masters.take_gradients()
        masters.multiply_gradients(1 / scale.scale if scale else 1)
        assert masters.masters[0].grad.tolist() == [found] * 3


def test_a_scale_that_is_far_too_high_falls_and_the_run_goes_on(fit, monkeypatch):
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**21)
    _, result, run = fit(quantization=FLOAT16, **(SETTINGS | {"max_steps": 12, "watchdog_steps": 4}))
    found = records(run)
    rescaled = [line for line in found if "loss" not in line]
    assert [line["step"] for line in rescaled] == list(range(1, len(rescaled) + 1))
    assert [line["loss_scale"] for line in rescaled] == [2.0 ** (21 - line["step"]) for line in rescaled]
    assert 4 <= len(rescaled) <= 8  # three in a row of another kind would have ended it
    assert not any("not_taken" in line for line in found)
    read = record.read(run)
    assert [record.to_json(line) for line in read] == found
    assert [line.step for line in read if isinstance(line, record.Rescaled)] == [line["step"] for line in rescaled]
    assert result.loss == pytest.approx(sum(steps(run)) / len(steps(run)), rel=1e-5)  # the mean of what was taken


def test_the_first_weights_are_those_of_the_adapter_not_what_bfloat16_keeps_of_them(fit, monkeypatch):
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**8)  # the first step is taken
    given, attach = {}, methods.attach

    def keep(*args, **kwargs):
        model = attach(*args, **kwargs)
        given.update({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return model

    monkeypatch.setattr(methods, "attach", keep)
    for quantization in (FLOAT16, Quantization(compute_dtype="float32")):
        model, _, _ = fit(quantization=quantization, learning_rate=1e-6)
        now = dict(model.named_parameters())
        first = {name: values.float() for name, values in given.items() if "lora_A" in name}
        assert all((values - now[name].float()).abs().max() < 1e-5 for name, values in first.items())
        assert all((values - values.bfloat16().float()).abs().max() > 1e-4 for values in first.values())


@pytest.mark.slow
def test_several_micro_batches_a_step_share_one_scale(fit, monkeypatch):
    """A step that is left out for one of them leaves nothing of the others to the next."""
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**21)
    settings = {"quantization": FLOAT16, "kernels_setting": "auto", "max_steps": 8, "learning_rate": 1e-3}
    one = fit(UNEVEN, per_device_train_batch_size=16, tokens=10_000, **settings)
    many = fit(UNEVEN, gradient_accumulation_steps=16, tokens=200, **settings)
    for _, result, run in (one, many):
        found = records(run)
        rescaled = [line for line in found if "loss" not in line]
        assert 4 <= len(rescaled) < 8
        assert len({line["step"] for line in found}) == 8
        assert result.loss == pytest.approx(sum(steps(run)) / len(steps(run)), rel=1e-5)
        assert result.tokens == one[1].tokens
    count = min(len(steps(run)) for _, _, run in (one, many))
    assert steps(many[2])[:count] == pytest.approx(steps(one[2])[:count], rel=1e-2)
    first = [next(line["grad_norm"] for line in records(run) if "loss" in line) for _, _, run in (one, many)]
    assert first[0] == pytest.approx(first[1], rel=2e-2)


def test_a_run_that_never_comes_to_a_step_says_so(fit, monkeypatch):
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**24)
    with pytest.raises(
        TrainingFailed, match=r"every step was skipped .*in float16.*quantization.compute_dtype=float32"
    ):
        fit(quantization=FLOAT16, max_steps=3)
