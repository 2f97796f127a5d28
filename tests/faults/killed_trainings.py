"""Train a recipe many times, each killed with SIGKILL and resumed until it is done; print what came of it, as JSON.

    python tests/faults/killed_trainings.py RECIPE at-random COUNT SEED    COUNT kills at random moments
    python tests/faults/killed_trainings.py RECIPE at-files FIRST LAST EVERY
                                    one kill a run: before the FIRST-th, ... operation on files of the checkpoints

The libraries are imported once and every training is a fork of this process, which has computed nothing yet.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import bitsandbytes  # noqa: F401 (so that the forks need not import it)
import peft  # noqa: F401
import transformers  # noqa: F401
import trl  # noqa: F401

from qlora.commands.train import train
from qlora.recipe import Recipe

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}


def start(recipe, out, prepare=lambda: None):
    """Return the pid of a fork that trains, or goes on where there is something to go on from."""
    there = any((out / "checkpoints").glob("step-*[0-9]"))
    if out.exists() and not there:
        shutil.rmtree(out)  # killed before the first checkpoint
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            prepare()
            train(Recipe.load(recipe, [f"output_dir={out}"]), resume=there)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid


def to_the_end(recipe, out):
    """Train without a kill; return what came of it."""
    status = os.waitpid(start(recipe, out), 0)[1]
    assert status == 0, status
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = records[-1]["time"]
    for record in records:
        for key in ("time", "tokens_per_second", "memory_bytes"):
            record.pop(key, None)
    tensors = hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    left = sorted(path.name for path in (out / "checkpoints").iterdir())
    return {"tensors": tensors, "records": records, "left": left}, seconds


def last_change(out):
    """Return when the run in `out` has logged something last."""
    file = out / "metrics.jsonl"
    return file.stat().st_mtime_ns if file.exists() else None


def at_random(recipe, folder, whole, steps, count, seed):
    """whole, steps: seconds of a whole training, and of its steps."""
    moments, found, kills, late = random.Random(seed), [], 0, 0
    while kills < count:
        out = folder / f"random-{len(found)}"
        for _ in range(moments.randrange(1, 5)):
            before = last_change(out)
            pid = start(recipe, out)
            if moments.random() < 0.2:
                time.sleep(moments.uniform(0, whole))
            else:  # most of the time goes into the beginning; most kills come later
                while (
                    last_change(out) == before
                    and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
                ):
                    time.sleep(0.001)
                time.sleep(moments.uniform(0, steps))
            os.kill(pid, signal.SIGKILL)
            killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            kills += killed
            late += killed and any((out / "checkpoints").glob("step-*[0-9]"))
            if (out / "adapter").exists():
                break
        found.append(to_the_end(recipe, out)[0])  # says that it is finished, where it is
    return {"found": found, "kills": kills, "kills_after_the_first_checkpoint": late}


def killed_before(number, counter=None):
    """Have this process killed before its `number`-th operation on files of the checkpoints; count them to a file."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.fsdecode(arguments[0])
            inside = event in ("os.remove", "os.rmdir") and "/" not in path  # of rmtree, by folder descriptors
            if "/checkpoints" in path or inside:
                step(event)

    def step(event):
        nonlocal seen
        seen += 1
        if counter is not None:
            os.write(counter, f"{event}\n".encode())
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sync = os.fsync

    def fsync(file):
        step("fsync")
        sync(file)
        step("synced")

    os.fsync = fsync
    sys.addaudithook(hook)


def at_files(recipe, folder, numbers):
    reading, writing = os.pipe()
    status = os.waitpid(start(recipe, folder / "counted", lambda: killed_before(None, writing)), 0)[1]
    assert status == 0, status
    os.close(writing)
    with open(reading) as file:
        events = file.read().split()
    found = {}
    for number in range(*numbers):
        if number > len(events):
            break
        out = folder / f"file-{number}"
        pid = start(recipe, out, lambda number=number: killed_before(number))
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), number
        before = sorted(path.name for path in (out / "checkpoints").glob("*"))
        found[number] = {"event": events[number - 1], "before": before, **to_the_end(recipe, out)[0]}
        shutil.rmtree(out)
    return {"events": events, "found": found}


def main():
    recipe, how, *rest = sys.argv[1:]
    recipe = Path(recipe)
    folder = recipe.parent / "killed"
    folder.mkdir()
    to_the_end(recipe, folder / "first")  # rows are tokenized, files are in the cache
    begin = time.monotonic()
    whole, steps = to_the_end(recipe, folder / "whole")
    seconds = time.monotonic() - begin
    numbers = [int(word) for word in rest]
    if how == "at-random":
        result = at_random(recipe, folder, seconds, steps, *numbers)
    else:
        result = at_files(recipe, folder, (numbers[0], numbers[1] + 1, numbers[2]))
    print(json.dumps({"whole": whole, "seconds": seconds, **result}))


if __name__ == "__main__":
    main()
