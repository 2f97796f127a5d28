"""How busy the machine is: shares of the time between two readings."""

import collections

import psutil
import torch

from qlora.system import load

Times = collections.namedtuple("Times", "user system idle iowait guest")


def test_the_share_of_the_processor_is_what_was_not_idle_since_the_last_reading(monkeypatch):
    readings = iter(
        [Times(10, 0, 100, 0, 5), Times(40, 10, 150, 10, 30), Times(40, 10, 150, 10, 30), Times(50, 10, 150, 10, 30)]
    )
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(readings))
    found = load.Load(every=0)
    assert (
        found.now()["cpu_use"] == 0.4
    )  # 40 of 100 seconds: waiting for a disk is idle, a guest's time is in the user's
    assert found.now()["cpu_use"] == 0.0  # no time went by
    assert found.now()["cpu_use"] == 1.0


def test_it_is_read_once_a_second_however_often_it_is_asked_for(monkeypatch):
    clock, count = [0.0], []
    monkeypatch.setattr(load.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(load.Load, "_read", lambda self: count.append(clock[0]) or {"cpu_use": 0.0})
    found = load.Load()
    for clock[0] in (5.0, 5.5, 5.9, 6.1, 6.2):
        found.now()
    assert count == [5.0, 6.1]


def test_what_all_processes_hold_is_between_nothing_and_all():
    assert 0 < load.Load().now()["system_memory_bytes"] < psutil.virtual_memory().total


def test_a_gpu_is_asked_until_its_driver_does_not_say(monkeypatch):
    answers = [lambda: 50, lambda: 1 / 0, lambda: 70]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "utilization", lambda: answers.pop(0)())
    found = load.Load(every=0)
    assert found.now()["gpu_use"] == 0.5
    assert "gpu_use" not in found.now()
    assert "gpu_use" not in found.now()
    assert len(answers) == 1
