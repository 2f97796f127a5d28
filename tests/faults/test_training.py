"""Trainings that are killed, stopped, doubled and cut off for real, in processes of their own."""

import errno
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from qlora.commands.train import train
from qlora.runs.folder import RunDir
from qlora.system.errors import InputError
from tests import forked
from tests.conftest import messages, write_jsonl


@pytest.fixture
def recipe_file(make_recipe, tmp_path):
    """A recipe of four steps over two epochs, each saved, the newest two kept; with all that draws random numbers."""
    turns = [[("user", f"{n}?"), ("assistant", "ab " * (1 + n * 7 % 23))] for n in range(16)]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages(t)} for t in turns])
    recipe = make_recipe(
        lora={"r": 32, "lora_alpha": 32, "lora_dropout": 0.1},
        data={"train": str(rows), "eval_fraction": 0.1},
        training={"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
                  "neftune_noise_alpha": 5.0, "eval_steps": 2},
    )  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    return file


@pytest.fixture
def longer(recipe_file):
    """The same with twelve steps."""
    recipe_file.write_text(recipe_file.read_text().replace("max_steps: 4", "max_steps: 12"))
    return recipe_file


def killed(recipe_file, *arguments):
    script = Path(__file__).with_name("killed_trainings.py")
    done = forked.run(script, recipe_file, *arguments, timeout=3000)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_killed_at_random(result, count):
    assert result["kills"] >= count
    assert result["kills_after_the_first_checkpoint"] >= count // 2
    assert all(found == result["whole"] for found in result["found"])
    assert result["whole"]["left"] == ["step-11", "step-12"]


def assert_killed_at_files(result):
    for number, found in result["found"].items():
        assert {key: found[key] for key in ("tensors", "records", "left")} == result["whole"], number
    # they were killed where it matters: with something half written, and half removed
    assert any(name.endswith(".partial") for found in result["found"].values() for name in found["before"])


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_the_bits_are_the_same(longer):
    assert_killed_at_random(killed(longer, "at-random", 2, 1), 2)


@pytest.mark.slow
def test_killed_while_saving_and_rotating_and_resumed_the_bits_are_the_same(recipe_file):
    result = killed(recipe_file, "at-files", 90, 200, 27)
    assert_killed_at_files(result)
    assert len(result["found"]) >= 4
    assert {"fsync", "synced", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"} <= set(
        result["events"]
    )


@pytest.mark.slow
def test_killed_at_many_random_moments(longer):
    assert_killed_at_random(killed(longer, "at-random", 100, 2), 100)


@pytest.mark.slow
def test_killed_before_every_operation_on_a_file(recipe_file):
    result = killed(recipe_file, "at-files", 1, 10**6, 1)
    assert_killed_at_files(result)
    assert len(result["found"]) == len(result["events"])


# ---- signals ---------------------------------------------------------------------------------------------------------


def begin(recipe_file):
    command = [sys.executable, "-m", "qlora", "train", str(recipe_file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def endless(recipe_file, tmp_path):
    """Return endless(*arguments) -> a process that trains, once it has taken a step; it would take hours."""
    started = []

    def endless(*arguments, until="metrics.jsonl"):
        process = forked.Process(
            "train",
            recipe_file,
            "training.max_steps=100000",
            "training.eval_steps=100000",
            "training.save_steps=100000",
            *arguments,
        )
        started.append(process)
        file = tmp_path / "run" / until
        for _ in range(1200):
            if file.exists() and file.stat().st_size:
                return process
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        raise AssertionError(f"no {until}")

    yield endless
    for process in started:
        process.end()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on_and_that_works(endless, recipe_file, tmp_path, number, code):
    process = endless()
    process.send_signal(signal.SIGHUP)  # a terminal that is closed
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    (command,) = re.findall(r"^qlora: stopped; resume after step \d+ with:  qlora (train .* --resume)$", said, re.M)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(folder.name.removeprefix("step-"))
    if number == signal.SIGINT:
        return
    # to its end, by what was said, a few steps on
    longer = [*command.split(), f"training.max_steps={step + 2}", "--allow-change", "training.max_steps"]
    done = forked.run(*longer)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [*range(1, step + 3)]


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(endless, tmp_path):
    # within a step that is a pass over 14,000 rows
    rows = f"data.train=[{{path: {tmp_path / 'rows.jsonl'}, weight: 1000}}]"
    process = endless("training.gradient_accumulation_steps=100000", rows, until="environment.json")
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None  # the step goes on
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_signal_before_the_first_step_ends_at_once(recipe_file, tmp_path):
    process = begin(recipe_file)
    time.sleep(2.5)  # while libraries are imported or the model is loaded
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert "Traceback" not in said


def test_closed_pipes_do_no_harm(recipe_file, tmp_path):
    pipes = [tmp_path / "out", tmp_path / "err"]
    for path in pipes:
        os.mkfifo(path)
    out, err = (os.open(path, os.O_RDONLY | os.O_NONBLOCK) for path in pipes)
    with forked.Process("train", recipe_file, out=pipes[0], err=pipes[1]) as process:
        assert select.select([err], [], [], 60)[0]  # it has begun to speak
        os.close(out)
        os.close(err)
        assert process.wait(timeout=120) == 0
    assert (tmp_path / "run" / "adapter").is_dir()


# ---- two at once -----------------------------------------------------------------------------------------------------


def test_two_trainers_do_not_share_a_folder_and_a_killed_one_leaves_no_lock(endless, recipe_file, tmp_path):
    process = endless()
    other = forked.run("train", tmp_path / "run" / "recipe.yaml", "--resume")
    assert other.returncode == 2
    assert f"is in use by process {process.pid}; wait for it" in other.stderr
    process.kill()
    process.communicate()
    with RunDir(tmp_path / "run").locked():
        pass


def test_of_two_that_begin_together_one_has_the_folder(recipe_file, make_recipe):
    recipe = make_recipe()
    other = RunDir(recipe.output_dir).locked()  # it has seen an empty folder before
    with RunDir.create(recipe), pytest.raises(InputError, match=f"in use by process {os.getpid()}"), other:
        pass


def test_a_fork_that_outlives_a_killed_trainer_does_not_keep_its_lock(tmp_path):
    run, (reading, writing) = RunDir(tmp_path), os.pipe()
    trainer = os.fork()
    if trainer == 0:
        with run.locked():
            if os.fork() == 0:
                os.write(writing, b"%d" % os.getpid())
                time.sleep(60)
                os._exit(0)
            time.sleep(60)
        os._exit(0)
    fork = int(os.read(reading, 20))
    with pytest.raises(InputError, match=f"in use by process {trainer}"), run.locked():
        pass
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    try:
        with run.locked():
            os.kill(fork, 0)  # it is there
    finally:
        os.kill(fork, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def test_a_disk_that_is_full_leaves_the_checkpoints_that_are_there(recipe_file, monkeypatch, tmp_path):
    from qlora.recipe import Recipe
    from qlora.runs import checkpoints

    original, calls = checkpoints.save_file, iter(range(99))

    def full(tensors, path):
        if next(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    recipe = Recipe.load(recipe_file)
    with pytest.raises(InputError, match=r"No space left on device; a checkpoint needs [\d,]+ bytes, [\d,]+ are free"):
        train(recipe)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-1", "step-2"]
    run = train(recipe, resume=True)
    whole = train(Recipe.load(recipe_file, [f"output_dir={tmp_path / 'whole'}"]))
    a, b = (load_file(one.adapter / "adapter_model.safetensors") for one in (run, whole))
    assert all((a[name] == b[name]).all() for name in a)


# a file system of so many bytes that this process alone sees, as `unshare -rm` makes one
OWN_DISK = """
import ctypes, os, sys
from pathlib import Path
libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x20000
if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
    sys.exit(99)
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
    Path("/proc/self", name).write_text(text)
if libc.mount(b"tmpfs", sys.argv[2].encode(), b"tmpfs", 0, f"size={NUM_BYTES}".encode()):
    sys.exit(99)
"""
FULL_DISK = """
import shutil, sys
from pathlib import Path
from types import SimpleNamespace
from qlora.training.objectives.supervised import Trainer
from qlora.commands.train import train
from qlora.system.errors import InputError
from qlora.recipe import Recipe

recipe, disk = sys.argv[1], Path(sys.argv[2])
original, filler = Trainer.save, disk / "filler"

def save(self):
    original(self)
    if self.state.global_step == FULL_AT:
        with open(filler, "wb", buffering=0) as file:
            file.write(bytes(shutil.disk_usage(disk).free - LEFT))

Trainer.save = save
try:
    train(Recipe.load(recipe, [f"output_dir={disk / 'run'}"]))
except InputError as error:
    print(error)
left = sorted(path.name for path in (disk / "run").rglob("*"))
filler.unlink(missing_ok=True)
if any(name.startswith("step-") for name in left):
    Trainer.save = original
    run = train(Recipe.load(recipe, [f"output_dir={disk / 'run'}"]), resume=True)
    shutil.copytree(run.path, sys.argv[3])
print(left)
"""


def on_a_disk_of(num_bytes, tmp_path, recipe_file, full_at=0, left=0):
    """Run FULL_DISK on a file system of so many bytes; return what it printed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    program = f"FULL_AT, LEFT, NUM_BYTES = {full_at}, {left}, {num_bytes}\n{OWN_DISK}{FULL_DISK}"
    done = forked.run("-c", program, recipe_file, disk, tmp_path / "copy")
    if done.returncode == 99:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_disk_that_is_too_small_is_refused_before_training(recipe_file, tmp_path):
    said = on_a_disk_of(2_000_000, tmp_path, recipe_file)
    assert re.search(
        r"3 checkpoints of \d+ KiB and the adapter need [\d,]+ bytes more, [\d,]+ are free; free some, set", said
    )
    assert said.endswith("[]\n")


@pytest.mark.parametrize("name", ["step-4", "step-4.diverged-1"])
def test_what_was_set_aside_makes_no_room(make_recipe, tmp_path, monkeypatch, name):
    from qlora.jobs.planning.planned_training import refuse_full_disk

    recipe = make_recipe(training={"max_steps": 8, "save_steps": 4, "save_total_limit": None})
    aside = Path(recipe.output_dir) / "checkpoints" / name
    aside.mkdir(parents=True)
    (aside / "tensors.safetensors").write_bytes(bytes(1000))
    plan = SimpleNamespace(steps=8, checkpoint_bytes=1000, components={"adapter": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1200))
    if name == "step-4":  # one of the two is there
        return refuse_full_disk(recipe, plan)
    with pytest.raises(
        InputError, match="2 checkpoints of 1000 B and the adapter need 2,100 bytes more, 1,200 are free"
    ):
        refuse_full_disk(recipe, plan)


@pytest.mark.parametrize("left", [0, pytest.param(400_000, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_while_training_is_survived(recipe_file, tmp_path, left):
    said = on_a_disk_of(12_000_000, tmp_path, recipe_file, full_at=2, left=left)
    assert re.search(r"No space left on device.* free", said)
    assert "'step-1', 'step-2'" in said
    assert "partial" not in said
    from qlora.recipe import Recipe

    whole = train(Recipe.load(recipe_file, [f"output_dir={tmp_path / 'whole'}"]))
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path / "copy", whole.path))
    assert all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize("left", [pytest.param(0, marks=pytest.mark.slow), 30_000])
def test_a_disk_that_fills_up_before_the_adapter_is_written_costs_no_step(recipe_file, tmp_path, left):
    """Libraries in Rust have errors of their own for that, with a traceback until they were known."""
    said = on_a_disk_of(12_000_000, tmp_path, recipe_file, full_at=4, left=left)
    full = (
        r"run(/adapter)?: No space left on device; free some space; resume after step 4 with:  qlora train \S+ --resume"
    )
    assert re.search(full, said)
    assert "'step-3', 'step-4'" in said
    assert "partial" not in said
    assert "'adapter'" not in said
    from qlora.recipe import Recipe

    whole = train(Recipe.load(recipe_file, [f"output_dir={tmp_path / 'whole'}"]))
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path / "copy", whole.path))
    assert all((a[name] == b[name]).all() for name in a)
