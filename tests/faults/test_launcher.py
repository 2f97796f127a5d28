"""torchrun itself: told by a scheduler as its processes are, and killed. All real, and so slow."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qlora.runs.folder import RunDir

pytestmark = pytest.mark.slow


@pytest.fixture
def launched(make_recipe, tmp_path):
    """Yield (launcher, its processes, their run) of a training that has taken a step and would take a long time."""
    training = {"max_steps": 100_000, "save_steps": 100_000, "eval_steps": 100_000, "logging_steps": 1}
    recipe, run = tmp_path / "recipe.yaml", RunDir(tmp_path / "run")
    recipe.write_text(make_recipe(training=training).to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29511"]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    said = open(tmp_path / "said.txt", "w+")  # noqa: SIM115 (its own process writes into it)
    launcher = subprocess.Popen([*command, "-m", "qlora", "train", str(recipe)], env=environ, stdout=said, stderr=said)
    ours: list = []
    try:
        until = time.monotonic() + 200
        while not (run.metrics_file.exists() and run.metrics_file.read_text().count("\n") > 2):
            assert launcher.poll() is None, (tmp_path / "said.txt").read_text()
            assert time.monotonic() < until
            time.sleep(0.1)
        ours = [one for one in psutil.Process(launcher.pid).children(recursive=True) if "train" in one.cmdline()]
        yield launcher, ours, run
    finally:
        for one in (psutil.Process(launcher.pid), *ours) if launcher.poll() is None else ours:
            if one.is_running():
                one.kill()
        launcher.wait()
        said.close()


@pytest.mark.parametrize("what", ["SIGTERM to all", "SIGINT to the launcher", "kill -9 of the launcher"])
def test_its_processes_end_together_with_one_checkpoint(launched, what):
    launcher, ours, run = launched
    assert len(ours) == 2
    if what == "SIGTERM to all":
        for one in (*ours, launcher):
            one.send_signal(signal.SIGTERM)
    else:
        launcher.send_signal(signal.SIGINT if "SIGINT" in what else signal.SIGKILL)
    _, alive = psutil.wait_procs(ours, timeout=60)
    assert alive == []
    [checkpoint] = run.checkpoints.iterdir()
    assert checkpoint.name == f"step-{run.metrics_file.read_text().count(chr(10))}"
    assert not run.in_use()
