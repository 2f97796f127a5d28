"""How long a training still takes is said from its last two minutes: a machine may get slower."""

import pytest

from qlora.runs.record import Begun, Step
from qlora.terminal import lines, training


@pytest.fixture
def hear(monkeypatch, capsys):
    """Return hear(step, now) -> what is said of a step that is logged at this second of 200 steps, "" for nothing."""
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(lines, "can_redraw", lambda: False)
    steps = training.Steps(None)
    steps.hear(Begun(0, 200, 0))

    def hear(step, now):
        clock[0] = now
        steps.hear(Step(step, 0.0, 1.0, 1e-3, 1.0, 100, 10.0, 0, now))
        return capsys.readouterr().err.strip()

    return hear


def test_the_time_that_is_left_is_that_of_recent_steps(hear):
    assert "left" not in hear(1, 60.0)  # slow, for it warms up
    for step in range(2, 101):
        said = hear(step, 60.0 + (step - 1))  # a second each
    assert hear(101, 160.0 + 21).endswith(" left")
    now = 181.0
    for step in range(102, 181):
        now += 4.0  # the machine is shared from here on
        said = hear(step, now) or said
    # the last that was said is at most 20 seconds old: 4 seconds a step, not the mean of all, which is 2.4
    last, left = said.split("step ")[1].split("/")[0], said.split("  ")[-1]
    assert left == training.duration(4.0 * (200 - int(last))) + " left"


def test_steps_that_take_longer_than_that_have_a_pace_too(hear):
    hear(1, 100.0)
    assert hear(2, 400.0).endswith(f"  {training.duration(300 * 198)} left")
    assert hear(3, 800.0).endswith(f"  {training.duration(400 * 197)} left")
    assert "left" not in hear(200, 801.0)  # it is done
