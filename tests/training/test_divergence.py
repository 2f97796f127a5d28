"""A watch ends runs that diverge, soon, and leaves healthy ones alone."""

import json
import math
import random

import pytest

from qlora.training.divergence import FEW, Watch


def judged(losses, num_steps=50):
    """Return the step in which a Watch ends a run of these losses, or None."""
    watch = Watch(num_steps)
    return next((step for step, loss in enumerate(losses, start=1) if watch.take(step, loss)), None)


def noisy(means, spread=0.7, seed=0):
    """Losses of single rows: they differ from each other much more than from step to step."""
    rng = random.Random(seed)
    return [max(0.01, rng.gauss(mean, spread)) for mean in means]


@pytest.mark.parametrize("seed", range(20))
def test_healthy_runs_are_left_alone(seed):
    falling = [0.4 + 2 * math.exp(-step / 100) for step in range(1000)]
    assert judged(noisy(falling, seed=seed)) is None
    assert judged(noisy([2.0] * 1000, seed=seed)) is None  # nothing is learned, nothing is lost
    spikes = [20.0 if step % 25 == 0 else mean for step, mean in enumerate(falling)]
    assert judged(noisy(spikes, seed=seed)) is None
    hard_rows = falling[:500] + [mean + 3 for mean in falling[500:510]] + falling[510:]
    assert judged(noisy(hard_rows, 0.5, seed)) is None


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("hard", [0.3, 0.4, 0.6])
def test_steps_of_two_kinds_easy_and_hard_are_left_alone(seed, hard):
    # short labels beside long answers: the median of such losses jumps from one kind to the other
    rng = random.Random(seed)
    assert judged(noisy([2.7 if rng.random() < hard else 0.2 for _ in range(1000)], 0.15, seed)) is None


def test_of_rows_that_are_sorted_by_length_the_first_say_nothing():
    losses = noisy([0.4, 0.8, 1.8, 2.2, 2.6], 0.05)  # the longest ones first, as `group_by_length` has them
    cycle = [loss for loss in losses for _ in range(10)] * 4
    assert judged(cycle) == 50
    watch = Watch(50, first=math.inf)
    assert not any(watch.take(step, loss) for step, loss in enumerate(cycle, start=1))
    assert any(watch.take(step, 5.0) for step in range(201, 251))


@pytest.mark.parametrize("seed", range(20))
def test_runs_that_diverge_are_ended_soon(seed):
    falling = [0.4 + 2 * math.exp(-step / 100) for step in range(300)]
    assert 300 < judged(noisy(falling + [7.0] * 100, seed=seed)) <= 350
    assert 300 < judged(noisy(falling + [0.5 + 0.02 * step for step in range(200)], seed=seed)) <= 450
    # from nearly the beginning: the first ten steps are what it is measured against
    assert 50 <= judged(noisy([1.5] * 7 + [9.0] * 100, seed=seed)) <= 80


@pytest.mark.parametrize("seed", range(20))
def test_the_last_good_step_is_the_one_before_the_loss_rose(seed):
    watch = Watch(50)
    for step, loss in enumerate(
        noisy([0.4 + 2 * math.exp(-step / 100) for step in range(300)] + [7.0] * 50, seed=seed)
    ):
        if watch.take(step, loss):
            break
    assert watch.diverged
    assert 285 <= watch.last_good_step() <= 300


def test_a_run_whose_last_step_is_low_has_a_last_good_step_too():
    watch, losses = Watch(50), [1.0] * 11 + [2.9, 2.9, 1.5] * 20
    step = next(step for step, loss in enumerate(losses, start=1) if watch.take(step, loss))
    assert losses[step - 1] == 1.5
    assert 0 <= watch.last_good_step() < step


def test_a_watch_goes_on_where_it_was():
    losses = noisy([1.0] * 90 + [4.0] * 60)
    whole, expected = Watch(50), None
    for step, loss in enumerate(losses, start=1):
        expected = expected or whole.take(step, loss)
    first, second, found = Watch(50), Watch(50), None
    assert not any(first.take(step, loss) for step, loss in enumerate(losses[:100], start=1))
    second.restore(json.loads(json.dumps(first.state())))
    for step, loss in enumerate(losses[100:], start=101):
        found = found or second.take(step, loss)
    assert found == expected is not None


def test_one_row_in_many_that_is_never_finite_ends_no_run():
    watch = Watch(None)
    for step in range(1, 20_000):
        assert (watch.leave_out(step, "the loss is nan") if step % 150 == 0 else watch.take(step, 1.0)) is None
    assert watch.not_taken > 10 * FEW


def test_steps_that_are_not_taken_now_and_then_end_a_run_too():
    watch, ended = Watch(None), []
    for step in range(1, 100):
        ended.append(watch.leave_out(step, "the loss is nan") if step % 2 else watch.take(step, 1.0))
    assert next(step for step, why in enumerate(ended, start=1) if why) == 2 * FEW - 1
