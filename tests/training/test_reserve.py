"""What the rehearsal leaves free: too little, and more layers are checkpointed before the first step, to the same numbers."""

import json
import os
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.optim import AdamW
from trl import SFTTrainer

from qlora.jobs.planning.planned_training import refuse_full_host
from qlora.recipe import Lora
from qlora.runs import checkpoints
from qlora.runs.record import LessMemory, from_json, read
from qlora.system import memory
from qlora.system.errors import DoesNotFit
from qlora.terminal.training import Steps
from qlora.training import rehearsal, reliable_trainer
from qlora.training.reserve import FLOOR, Reserve
from tests.conftest import some_slow
from tests.training.conftest import UNEVEN, losses, trained


@pytest.fixture
def counted(fit, monkeypatch):
    """Return run(**how) -> (losses, weights, memory.json, changes) of fit(UNEVEN, **how), the peak being that of the tensors
    that forward and backward passes make."""

    def run(**how):
        live, original = memory.LiveTensors(), SFTTrainer.training_step

        class Peak(memory.Peak):
            bytes = property(lambda self: live.peak)

            def lap(self):
                found, live.peak = live.peak, live.bytes
                return found

        def within(self, *args, **kwargs):
            with live:
                return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(SFTTrainer, "training_step", within)
            patch.setattr(memory, "Peak", Peak)
            model, _, folder = fit(UNEVEN, **{"max_steps": 2, "lora": Lora(r=4, lora_dropout=0.2)} | how)
        changes = [line for line in read(folder) if isinstance(line, LessMemory)]
        found = [line for line in losses(folder) if "out_of_memory" not in line]
        return found, trained(model), json.loads(folder.memory_file.read_text()), changes

    return run


def test_too_little_left_by_the_rehearsal_checkpoints_layers_before_the_first_step(counted, capsys):
    plain, weights, kept, _ = counted()
    assert kept["reserve_bytes"] is None  # nobody said what there is
    peak = kept["rehearsed_bytes"]
    one = counted(checkpointed_layers=1)[2]["rehearsed_bytes"]
    limit = round(1.01 * peak)  # 1 % left, where 2 % are the least reserve
    assert one < limit - FLOOR * limit
    found, now, kept, changes = counted(limit_bytes=limit, predicted_bytes=peak)
    assert (kept["checkpointed_layers"], kept["rehearsed_bytes"]) == (1, one)
    assert kept["reserve_bytes"] == round(FLOOR * limit)
    (change,) = changes  # said once
    assert change.reserve
    assert change.step == 0
    assert change.out_of_memory.startswith("in the rehearsal, before the first step: ")
    assert found == plain
    assert all(torch.equal(weights[name], now[name]) for name in weights)
    capsys.readouterr()
    Steps(None).hear(change)
    said = capsys.readouterr().err
    assert "memory    in the rehearsal, before the first step: " in said
    assert "1 of 2 layers checkpointed instead of 0" in said
    older = {"step": 1, "out_of_memory": "in step 1", "change": "c", "rows": [1], "checkpointed_layers": 1}
    Steps(None).hear(from_json(older | {"offload": False, "time": 1.0}))
    assert "out of memory in step 1; run again" in capsys.readouterr().err

    *_, kept, changes = counted(limit_bytes=2 * peak, predicted_bytes=peak)
    assert (kept["checkpointed_layers"], changes) == (0, [])


def test_a_plan_that_was_too_low_asks_for_a_larger_reserve(counted):
    peak = counted()[2]["rehearsed_bytes"]
    limit = round(1.2 * peak)
    *_, kept, changes = counted(limit_bytes=limit, predicted_bytes=peak)
    assert not changes  # 17 % are left
    predicted = round(0.7 * peak)
    *_, kept, changes = counted(limit_bytes=limit, predicted_bytes=predicted)
    assert changes
    assert kept["reserve_bytes"] == max(round(FLOOR * limit), kept["rehearsed_bytes"] - predicted)


@pytest.mark.slow
def test_where_all_layers_are_checkpointed_the_run_goes_on_with_what_is_left(counted):
    plain, _, kept, _ = counted(checkpointed_layers=2)
    found, _, _, changes = counted(checkpointed_layers=2, limit_bytes=kept["rehearsed_bytes"])
    assert found == plain
    assert not changes  # rows in halves would be other numbers


def test_what_the_allocator_holds_beside_its_tensors_is_part_of_the_reserve(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 950)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 850)
    reserve = Reserve(limit_bytes=1000, predicted_bytes=900)
    assert reserve.learn(850) == 50
    assert reserve.bytes == 100
    assert Reserve().learn(850) is None


def test_a_lap_is_the_peak_since_the_last_and_all_of_them_are_the_block_s():
    with memory.Peak() as peak:
        before = memory.anonymous_bytes()
        block = torch.ones(2**25)  # 128 MiB
        assert peak.lap() > before + 100 * 2**20
        del block
        peak.lap()
        assert peak.lap() < before + 50 * 2**20
        assert peak.bytes > before + 100 * 2**20
    assert peak.bytes > before + 100 * 2**20


@pytest.mark.skipif(not memory._glibc(), reason="another C library")
def test_holes_of_the_heap_go_back_to_the_system():
    with memory.freed_at_once():
        pass  # as after loading a model
    blocks = [torch.ones(2**18) for _ in range(128)]  # 1 MiB each, in the heap
    held, kept = memory.anonymous_bytes(), blocks[1::8]
    del blocks
    memory._given_back = 0.0
    memory.give_back_holes(torch.device("cpu"))
    assert memory.anonymous_bytes() < held - 80 * 2**20
    assert len(kept) == 16


# ---- the optimizer's step -------------------------------------------------------------------------------------------


OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "paged_adamw_8bit", "paged_lion_32bit"]


@pytest.mark.parametrize("optim", some_slow(OPTIMIZERS, but=["paged_adamw_8bit"]))
def test_the_optimizer_has_its_states_before_the_first_step_and_they_change_no_number(fit, monkeypatch, optim):
    original, found = reliable_trainer.allocate_states, []

    def states(trainer):
        held = trainer.own_optimizer.state
        return {(at, key): held[master][key].data_ptr() for at, master in enumerate(trainer.trained.masters.masters)
                for key in held[master] if key in ("exp_avg", "exp_avg_sq", "state1", "state2")}  # fmt: skip

    def allocate(trainer):
        original(trainer)
        found.append((trainer, states(trainer)))

    runs = []
    for function in (allocate, lambda trainer: None):
        monkeypatch.setattr(reliable_trainer, "allocate_states", function)
        how = {"lora": Lora(r=32), "max_steps": 3, "weight_decay": 0.1, "optim": optim, "rehearse": False}
        model, _, run = fit(UNEVEN, **how)
        runs.append((losses(run), trained(model)))
    ((trainer, before),) = found
    assert len(before) >= len(trainer.trained.names)
    assert states(trainer) == before  # the steps have allocated none
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())


@pytest.mark.parametrize("refusals", [0, 1, 2])
def test_what_a_step_needs_for_itself_is_asked_for_before_it_is_taken(monkeypatch, refusals):
    asked, freed, original = [], [], torch.empty_like

    def limited(tensor):
        asked.append(tensor.numel())
        if asked.count(5) <= refusals and tensor.numel() == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 bytes")
        return original(tensor)

    masters = [torch.nn.Parameter(torch.zeros(count)) for count in (3, 5)]
    trainer = SimpleNamespace(
        model=SimpleNamespace(device=torch.device("cuda")),
        own_optimizer=torch.optim.AdamW(masters),
        trained=SimpleNamespace(masters=SimpleNamespace(masters=masters)),
    )
    monkeypatch.setattr(rehearsal.torch, "empty_like", limited)
    monkeypatch.setattr(memory, "free_cached", lambda: freed.append(True))
    if refusals == 2:
        with pytest.raises(torch.OutOfMemoryError):
            rehearsal.room_for_a_step(trainer)
    else:
        rehearsal.room_for_a_step(trainer)
    assert len(freed) == min(refusals, 1)
    assert asked[:2] == [3, 5]
    asked.clear()
    trainer.own_optimizer = AdamW(masters, optim_bits=8)  # works in place
    rehearsal.room_for_a_step(trainer)
    assert not asked


def test_paged_states_are_filled_after_the_device_is_done_with_making_them():
    parameters = [torch.nn.Parameter(torch.ones(8192)) for _ in range(2)]
    names, optimizer = ["a", "b"], AdamW(parameters, optim_bits=8)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    tensors, numbers = checkpoints.optimizer_state(optimizer, names)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    again, seen = AdamW(parameters, optim_bits=8), []

    def settle():
        seen.append([again.state[parameter]["state1"].count_nonzero().item() for parameter in parameters])

    checkpoints.restore_optimizer(again, names, tensors, numbers, settle)
    assert seen == [[0, 0]]  # both were made, neither was filled
    assert torch.equal(again.state[parameters[1]]["state1"], tensors["b/state1"])
    assert tensors["b/state1"].any()


# ---- the host, the allocator ----------------------------------------------------------------------------------------


def test_what_is_offloaded_must_fit_into_the_free_memory_of_the_host(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=8 * 2**30))
    refuse_full_host(SimpleNamespace(host_bytes=8 * 2**30))
    with pytest.raises(
        DoesNotFit, match=r"moves 8\.1\d GiB of layer inputs to CPU memory, 8\.00 GiB are free there"
    ) as caught:
        refuse_full_host(SimpleNamespace(host_bytes=round(8.125 * 2**30)))
    assert "data.max_length" in str(caught.value)
    refuse_full_host(SimpleNamespace(host_bytes=4 * 2**30), here=2)
    with pytest.raises(DoesNotFit, match=r"8\.25 GiB of layer inputs of 2 processes to CPU memory, 8\.00 GiB are free"):
        refuse_full_host(SimpleNamespace(host_bytes=round(4.125 * 2**30)), here=2)


@pytest.mark.parametrize(
    ("platform", "given", "then"),
    [
        ("linux", {}, "expandable_segments:True"),
        ("linux", {"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ("linux", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
        ("win32", {}, None),
    ],
)
def test_segments_grow_on_linux_unless_the_user_has_decided(monkeypatch, platform, given, then):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    runpy.run_path(memory.__file__)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == then
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
