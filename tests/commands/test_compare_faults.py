"""qlora compare: killed, stopped, doubled, on a full disk; nothing goes on alone, and the table is that of an unbroken one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora.commands.compare import compare
from qlora.jobs.comparing import compared_runs
from qlora.runs.folder import RunDir
from qlora.system.errors import DoesNotFit, InputError
from tests.commands.test_compare import comparison, in_process, without_times  # noqa: F401 (fixtures)
from tests.conftest import some_slow

STEPS = 400  # of a few milliseconds each


def wait_until(true, seconds=120):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def trains(run):
    return run.metrics_file.exists() and run.metrics_file.stat().st_size > 0


def started(path, **more):
    """Return `qlora compare` as a process, once its first training has taken a step; and that training's run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora", "compare", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **more
    )
    run = RunDir(path.parent / "compared" / "lora")
    wait_until(lambda: trains(run) or process.poll() is not None)
    assert process.poll() is None
    return process, run


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C in a terminal"])
def test_no_training_goes_on_without_its_comparison_and_the_table_is_the_same(
    comparison,  # noqa: F811
    in_process,  # noqa: F811
    tmp_path,
    how,
):
    training = {"training.max_steps": STEPS, "training.save_steps": STEPS, "training.logging_steps": 1}
    path = comparison(variants={"lora": training}, max_rows=2)
    process, run = started(path, start_new_session=True)
    if how == "kill -9":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    wait_until(lambda: not run.in_use(), 60)
    if how != "kill -9":
        assert process.returncode == 130
        assert said.splitlines()[-1].startswith("qlora: stopped; what is there is kept; go on with:  qlora compare")
    steps = [int(folder.name.removeprefix("step-")) for folder in run.checkpoints.glob("step-*")]
    assert len(steps) == 1  # saved at the end of the step that it was in
    assert 0 < steps[0] < STEPS
    assert not run.adapter.exists()
    assert "training  step 1/" in (tmp_path / "compared" / "logs" / "lora.txt").read_text()

    found = compare(path, resume=True)
    assert "--resume" in " ".join(in_process[0])
    whole = compare(path, [f"output_dir={tmp_path}/whole"])
    expected = json.loads(json.dumps(without_times(whole)).replace("/whole/", "/compared/"))
    assert without_times(found)["rows"] == expected["rows"]


def test_a_training_that_still_runs_is_left_alone(comparison, in_process, tmp_path):  # noqa: F811
    """Of a comparison that was killed; its folder would be removed, because it has no checkpoint yet."""
    path = comparison()
    compare(path, dry_run=True)
    folder = compared_runs.Folder(compared_runs.Comparison.load(path))
    folder.path.mkdir()
    folder.begin()
    run = RunDir(tmp_path / "compared" / "lora")
    run.path.mkdir()
    run.recipe_file.write_text("mine")
    with (
        run.locked(),
        pytest.raises(InputError, match=r"compared/lora: a process trains there; wait for it to end"),
    ):
        compare(path, resume=True)
    assert run.recipe_file.read_text() == "mine"
    assert in_process == []
    (run.checkpoints / "step-1.partial").mkdir(parents=True)  # killed while it wrote its first: nothing to go on from
    assert run.checkpoint_steps() == []
    assert compare(path, resume=True)["rows"][0]["status"] == "done"


@pytest.mark.parametrize("written", some_slow([0, 1], [0]))
def test_one_that_ended_while_it_began_can_be_begun_again(comparison, in_process, tmp_path, monkeypatch, written):  # noqa: F811
    """It was refused with --resume, as there was no comparison.yaml yet, and without, as the folder was not empty."""
    path, real, calls = comparison(), compared_runs.write_text, iter(range(99))

    def full(file, text):
        if next(calls) == written:
            raise OSError(28, "No space left on device", str(file))
        real(file, text)

    monkeypatch.setattr(compared_runs, "write_text", full)
    with pytest.raises(OSError, match="No space left on device"):
        compare(path)
    assert in_process == []
    found = compare(path, resume=written > 0)
    assert [row["status"] for row in found["rows"]] == ["done"]
    assert (tmp_path / "compared" / "recipes" / "lora.yaml").is_file()


def test_what_failed_is_tried_again_and_what_would_fail_again_is_not(comparison, in_process, monkeypatch):  # noqa: F811
    variants = {"full-disk": None, "after-it": {"after": "full-disk"}, "large": {"lora.r": 2}, "hot": {"lora.r": 8}}
    ends = {
        "full-disk": (2, "No space left on device"),
        "large": (DoesNotFit.exit_code, ""),
        "hot": (1, "has diverged"),
    }
    path, real = comparison(variants=variants), compared_runs.launch

    def ended(arguments, log):
        return next((end for name, end in ends.items() if f"/{name}" in arguments[1]), None) or real(arguments, log)

    monkeypatch.setattr(compared_runs, "launch", ended)
    first = compare(path)
    assert [row["status"] for row in first["rows"]] == ["failed", "failed", "does not fit", "diverged"]
    assert in_process == []
    ends.pop("full-disk")
    again = compare(path, resume=True)
    assert [row["status"] for row in again["rows"]] == ["done", "done", "does not fit", "diverged"]
    assert [command[0] for command in in_process] == ["train", "eval"] * 2
    compare(path, resume=True)
    assert len(in_process) == 4


def test_a_log_that_cannot_be_written_ends_it_and_is_named():
    with pytest.raises(InputError, match=r"/dev/full: No space left on device; see to that, then go on with --resume"):
        compared_runs.launch(["plan"], Path("/dev/full"))


def test_rows_for_forgetting_that_are_not_there_are_missed_before_anything_is_trained(comparison, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        compare(comparison(forgetting="nowhere.jsonl"))
    assert not (tmp_path / "compared").exists()


def test_an_output_dir_in_a_file_is_refused(comparison, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("mine")
    path = comparison(output_dir=str(tmp_path / "file" / "compared"))
    with pytest.raises(InputError, match=r"file/compared: Not a directory; choose another folder"):
        compare(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_picture_is_whole_or_absent(comparison, in_process, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    path = comparison()
    compare(path)
    picture = tmp_path / "compared" / "comparison.png"
    before = picture.read_bytes()

    real = os.replace

    def full(partial, path):
        if str(path).endswith(".png"):
            raise OSError(28, "No space left on device")
        real(partial, path)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"comparison\.png: No space left on device"):
        compare(path, resume=True)
    assert picture.read_bytes() == before
    assert not list((tmp_path / "compared").glob("*.partial"))
