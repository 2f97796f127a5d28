"""How a training fits into this machine, from values alone: nothing is printed, nothing is read but the data."""

import pytest
import torch

from qlora.jobs.opening.prepared_data import prepare
from qlora.jobs.planning.planned_training import plan_training
from qlora.system import events
from qlora.system.errors import DoesNotFit, InputError

CPU = torch.device("cpu")


def test_a_plan_says_how_many_layers_and_how_much_memory_and_prints_nothing(make_recipe, capsys):
    heard = []
    with events.heard_by(heard.append):
        prepared = prepare(make_recipe(memory={"budget": "8GiB"}, quantization={"compute_dtype": "float32"}))
        planned = plan_training(prepared, CPU)
    assert planned.plan.budget_bytes == 8 * 2**30
    assert 0 < planned.plan.peak_bytes < planned.predicted_bytes  # this process holds torch too
    assert planned.checkpointed_layers == planned.plan.checkpointed_layers
    out, err = capsys.readouterr()
    assert out == ""
    assert "plan  " not in err  # a library says a word of its own where it is first imported
    assert "rows" not in err
    assert {type(event) for event in heard} <= {events.Progress}


def test_what_does_not_fit_says_what_would(make_recipe, monkeypatch):
    monkeypatch.setattr("qlora.planner.footprint._HELD_ON_CPU", 0)  # more than all that a tiny model has
    prepared = prepare(make_recipe(memory={"budget": "10KiB"}, training={"tokens_per_micro_batch": None}))
    with pytest.raises(DoesNotFit, match=r"are memory\.budget; what would help, best first:\n  \w"):
        plan_training(prepared, CPU)
    monkeypatch.undo()
    with pytest.raises(DoesNotFit, match=r"10 KiB are memory\.budget; no setting would make it less"):
        plan_training(prepare(make_recipe(memory={"budget": "10KiB"})), CPU)


def test_processes_of_one_machine_plan_each_with_a_share_of_its_memory_and_not_of_a_budget(make_recipe, monkeypatch):
    monkeypatch.setattr("qlora.system.memory.available_bytes", lambda device: 8 * 2**30)
    prepared = prepare(make_recipe())
    found = [plan_training(prepared, CPU, here=here) for here in (1, 4)]
    assert [one.plan.budget_bytes for one in found] == [8 * 2**30, 2 * 2**30]
    assert found[1].limit_bytes - found[1].predicted_bytes + found[1].plan.peak_bytes == 2 * 2**30
    assert [one.sharers for one in found] == [1, 4]
    given = plan_training(prepare(make_recipe(memory={"budget": "8GiB"})), CPU, here=4)
    assert (given.plan.budget_bytes, given.sharers) == (8 * 2**30, 1)
    monkeypatch.setattr("qlora.system.memory.available_bytes", lambda device: 40 * 2**10)
    with pytest.raises(DoesNotFit, match=r"10 KiB are free for each of 4 processes; "):
        plan_training(prepared, CPU, here=4)


def test_more_layers_than_there_are_is_refused(make_recipe):
    with pytest.raises(InputError, match=r"memory\.gradient_checkpointing is 99, but the model has 2 layers"):
        plan_training(prepare(make_recipe(memory={"gradient_checkpointing": 99})), CPU)
