"""Signals that another process sends or passes on: the one that started a command, a launcher, a scheduler. Each counts once."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from qlora.system.signals import ENDS_WITH_STDIN

# a step, a signal that is noted, and a checkpoint that takes a while
PROGRAM = """
import hashlib, os, sys, time
from qlora.system import signals
with signals.handled(leaves=True), signals.noted() as stop:
    print("begun", "QLORA_ENDS_WITH_STDIN" in os.environ, flush=True)
    while stop.number is None:
        BUSY
    time.sleep(1.5)
    print("saved after", stop.number, flush=True)
"""
SHORT = "time.sleep(0.01)"
LONG = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000)"  # no signal is handled before it returns; threads go on


@contextlib.contextmanager
def begun(busy=SHORT, **surroundings):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("BUSY", busy)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {ENDS_WITH_STDIN: "1"} | surroundings,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "begun False\n"  # what this process starts is not meant
        yield process


@pytest.mark.parametrize(
    "busy", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short steps", "a long step"]
)
@pytest.mark.parametrize("number", [None, pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_it_is_told_once_and_saves(busy, number):
    """Ctrl-C in a terminal, and a scheduler's SIGTERM, come to both; then the other closes the pipe."""
    with begun(busy) as process:
        if number is not None:
            process.send_signal(number)
        process.stdin.close()
        assert process.stdout.read() == f"saved after {number or signal.SIGTERM:d}\n"
        assert process.wait(20) == 0


def test_a_second_signal_of_the_user_ends_it_at_once():
    with begun() as process:
        process.stdin.close()
        time.sleep(1)  # its step is over, and it saves
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
        assert process.stdout.read() == ""


def test_without_a_parent_that_asks_for_it_stdin_means_nothing():
    program = PROGRAM.replace("BUSY", "time.sleep(0.5); os.kill(os.getpid(), 2)")
    done = subprocess.run([sys.executable, "-c", program], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.stdout == "begun False\nsaved after 2\n"


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_what_a_launcher_passes_on_is_no_second_signal(number):
    """A scheduler tells all processes of a job; torchrun gets it too, and tells its own."""
    with begun(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2") as process:
        process.send_signal(number)
        time.sleep(0.7)  # it saves
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == f"saved after {number:d}\n"
        assert process.wait(20) == 0
    with begun() as process:
        process.send_signal(number)
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        assert (process.wait(20), process.stdout.read()) == (143, "")


def test_when_torchrun_is_killed_its_processes_save_and_end():
    """Without it they would train on, each on its card, and nobody would know."""
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PROGRAM.replace('BUSY', SHORT)!r}])"
    surroundings = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, env=os.environ | surroundings
    ) as process:
        assert process.stdout.readline() == b"begun False\n"
        process.kill()
        assert process.stdout.read() == b"saved after 15\n"
