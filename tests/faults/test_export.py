"""Faults of the real kind: SIGKILL at random moments, a disk that is full."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora.commands.export import export
from qlora.system.errors import InputError
from tests import forked
from tests.conftest import some_slow


def contents(folder):
    """Return {file name: bytes} of a model folder; what was measured of the export itself is left out of its report."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(found.pop("export_report.json"))
    for key in ("seconds", "write_seconds", "peak_bytes", "proof_peak_bytes"):
        assert report.pop(key) > 0
    found.pop("README.md")  # has the folder's name
    return found | {"report": report}


def kill(run, out, count, seed):
    script = Path(__file__).with_name("killed_exports.py")
    done = forked.run(script, run.path, out, count, seed, timeout=540)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("times", "at_work"), some_slow([(3, 1), (20, 3)], [(20, 3)]))
def test_killed_at_any_moment_and_run_again_the_bytes_are_the_same(trained_once, tmp_path, times, at_work):
    run = trained_once()
    result = kill(run, tmp_path / "out", times, seed=1)
    assert result["done"]
    # what a killed export leaves is a folder that says so by its name, or nothing, or the whole
    partial = {"out.partial", "out.partial.lock"}
    assert all(set(left) <= partial or set(left) - {"out.partial.lock"} == {"out"} for left in result["left"])
    assert sum("out.partial" in left for left in result["left"]) >= at_work  # some were killed at work
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out", "whole"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, less than the tiny model takes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_too_small_is_refused_ahead(trained_once, small_disk):
    run = trained_once()
    with pytest.raises(InputError, match=r"the model needs 64 MiB, and 2\d\d KiB are free on that disk"):
        export(run.path, small_disk / "out")
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_a_disk_that_fills_up_on_the_way_leaves_nothing(trained_once, small_disk, monkeypatch, max_shard_size):
    run = trained_once()
    # it was free when the export began
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**40))
    with pytest.raises(
        InputError, match=r"out.partial/model.*safetensors: No space left on device; 2\d\d,\d\d\d bytes"
    ):
        export(run.path, small_disk / "out", overrides=[f"export.max_shard_size={max_shard_size}"])
    assert not list(small_disk.iterdir())
