"""The micro-batches that the rows of a step can be joined into, and which of them is taken."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qlora import planner
from qlora.commands.plan import plan
from qlora.commands.train import train
from qlora.jobs.opening.prepared_data import prepare
from qlora.jobs.planning.joined_steps import joined_steps
from qlora.jobs.planning.plan_job import Budget, job_of
from qlora.jobs.planning.planned_training import plan_training
from qlora.recipe import Training
from qlora.system.errors import Interrupted
from qlora.training.processes import Processes
from qlora.training.reliable_trainer import Reliable
from tests.runs.test_checkpoints import assert_same_run, stop_at

CPU = torch.device("cpu")


def test_sizes_go_from_the_longest_row_to_a_whole_step():
    lengths = np.array([600, 100, 50, 50] * 100)
    found = joined_steps(lengths, lengths // 2, rows=8)
    assert [one.load.length for one in found] == [600, 1024, 2048, 4096, 4800]
    assert [one.load.alone for one in found] == [False] * 4 + [True]
    assert {(one.load.document, one.load.joined, one.num_steps) for one in found} == {(600, True, 50)}
    assert [one.load.scored for one in found] == [300, 512, 1024, 2048, 2400]
    counts = [one.num_micro_batches for one in found]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 100  # more than two of the 600 in most steps
    assert counts[-1] == 50
    # half of the tokens are in rows of 600, so to say
    assert found[0].load.attended == pytest.approx((600**2 + 100**2 + 2 * 50**2) / 800)


@pytest.mark.parametrize(("tokens", "sizes"), [(1500, [1500]), (10**6, [2400]), (599, [600, 1024, 2048, 2400])])
def test_a_given_size_is_taken_unless_a_row_is_longer(tokens, sizes):
    lengths = np.full(12, 600)
    assert [one.load.length for one in joined_steps(lengths, lengths, 4, tokens)] == sizes


def test_several_processes_share_a_step_evenly():
    lengths = np.array([600, 100, 50, 50] * 100)
    found = joined_steps(lengths, lengths // 2, rows=8, parts=2)
    assert found[-1].load.length == 2400  # half of a step of 600
    assert found[-1].load.alone
    assert found[-1].num_micro_batches == 2 * found[-1].num_steps
    assert all(one.num_micro_batches >= 2 * one.num_steps for one in found)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_training_sums_gradients_where_the_plan_says_so(count):
    """Else the rehearsal of several processes would hold 4 bytes a trained number that no step has."""
    lengths = np.array([600, 100, 50, 50] * 100)
    args = SimpleNamespace(per_device_train_batch_size=8)
    for one in joined_steps(lengths, lengths // 2, rows=8, parts=count):
        reliability = SimpleNamespace(tokens=one.load.length, lengths=lengths)
        trainer = SimpleNamespace(args=args, reliability=reliability, processes=Processes(count=count))
        assert Reliable.accumulates.fget(trainer) != one.load.alone


def test_few_rows_and_steps_of_one_row():
    (one,) = joined_steps([70], [1], 16)
    assert (one.load.length, one.load.scored, one.load.alone, one.num_micro_batches) == (70, 1, True, 1)
    (one,) = joined_steps([70, 30], [1, 30], 1)
    assert (one.load.length, one.load.alone, one.num_steps) == (70, True, 2)
    assert one.load.scored == 30


def test_the_size_is_the_fastest_that_fits_and_less_memory_takes_a_smaller_one(make_recipe):
    training = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1}
    prepared = prepare(make_recipe(training=training, data={"eval_fraction": 0.0}))
    job = job_of(prepared, "cpu", Budget(2**33))
    assert job.load.length == sum(prepared.examples.lengths)  # under 1,024: all of the step
    found = planner.plan(job)
    assert found.tokens_per_micro_batch == job.load.length
    assert (found.steps, job.num_micro_batches) == (2, 1)
    smallest = job_of(prepared, "cpu", Budget(2**33), tokens=max(prepared.examples.lengths))
    less = planner.plan(smallest).peak_bytes
    assert less < found.peak_bytes
    assert job_of(prepared, "cpu", Budget(less)).load.length == max(prepared.examples.lengths)


def test_a_resumed_size_that_no_longer_fits_is_chosen_anew(make_recipe):
    def prepared(**memory):
        training = {"per_device_train_batch_size": 64}
        return prepare(make_recipe(training=training, memory=memory, data={"eval_fraction": 0.0}))

    whole, longest = plan_training(prepared(), CPU), max(prepared().examples.lengths)
    same = plan_training(prepared(), CPU, tokens=longest)
    assert (same.tokens_per_micro_batch, same.tokens_before) == (longest, None)
    tight = prepared(budget=f"{(same.plan.peak_bytes + 1) / 2**20}MiB")
    found = plan_training(tight, CPU, tokens=whole.tokens_per_micro_batch)
    assert (found.tokens_per_micro_batch, found.tokens_before) == (longest, whole.tokens_per_micro_batch)


def test_a_resumed_run_has_the_micro_batches_that_it_was_begun_with(make_recipe, tmp_path, monkeypatch):
    """Chosen anew they would be others: what is the fastest may have changed since."""

    def recipe(name):
        training = {"max_steps": 4, "gradient_accumulation_steps": 2}
        return make_recipe(training=training, output_dir=str(tmp_path / name))

    monkeypatch.setattr(planner, "_TOKENS_ON_CPU", 1)
    whole = train(recipe("whole"))
    longest = whole.environment()["tokens_per_micro_batch"]
    assert longest == 32
    for _ in stop_at(monkeypatch, 2):
        with pytest.raises(Interrupted):
            train(recipe("run"))
    monkeypatch.setattr(planner, "_TOKENS_ON_CPU", 1024)
    assert plan_training(prepare(recipe("run")), CPU).tokens_per_micro_batch > longest
    resumed = train(recipe("run"), resume=True)
    assert resumed.environment()["tokens_per_micro_batch"] == longest
    assert_same_run(whole, resumed)


def test_on_a_card_short_rows_go_several_at_a_time(make_recipe):
    by_rows = plan(
        make_recipe(training={"tokens_per_micro_batch": None, "per_device_train_batch_size": 1}), card="4090"
    )
    joined = plan(make_recipe(), card="4090")
    assert (by_rows["tokens_per_micro_batch"], joined["limits"]["tokens_per_micro_batch"] > 128) == (None, True)
    assert joined["tokens_per_micro_batch"] > 0
    assert joined["tokens_per_second"] > 2 * by_rows["tokens_per_second"]


@pytest.mark.parametrize(
    "sections", [{"kernels": "off"}, {"data": {"packing": True}}, {"training": {"tokens_per_micro_batch": None}}]
)
def test_where_rows_are_not_joined_there_is_no_size(make_recipe, sections):
    assert job_of(prepare(make_recipe(**sections)), "cpu", Budget(2**33)).load.joins_steps is False


def test_a_number_fills_micro_batches_and_auto_does_not():
    assert (Training().joins_steps, Training().filled_to) == (True, None)
    assert (Training(tokens_per_micro_batch=64).joins_steps, Training(tokens_per_micro_batch=64).filled_to) == (
        False,
        64,
    )
    for wrong in ("many", 0, -1, True, 1.5):
        with pytest.raises(ValueError, match="should be auto, null or a number of tokens"):
            Training(tokens_per_micro_batch=wrong)
