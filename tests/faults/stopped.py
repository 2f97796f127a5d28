"""Run commands of qlora, each stopped by signals at chosen calls; print what came of each, as JSON.

    python tests/faults/stopped.py < CASES

CASES: a JSON list of {"argv", "folder", "signals": [[place, signal number], ...]} and perhaps "set": {place: value}, "environ",
"closed": true for a stdout that nobody reads. A place is "module:name.name". The first signal comes just before the
first call of its place, the next before the first call of its own place after that, and so on; number 0 is no signal. What
came of it: {"code", "said", "alive": [processes that are left]}. The libraries are imported once, and every command is a
fork of this process, which has computed nothing yet, in a session of its own.
"""

import contextlib
import importlib
import json
import os
import sys
import tempfile
import time
import traceback

import bitsandbytes  # noqa: F401 (so that the forks need not import it)
import datasets  # noqa: F401
import peft  # noqa: F401
import psutil
import torch
import transformers

from qlora import cli


def owner_of(place):
    module, _, names = place.partition(":")
    owner, (*path, name) = importlib.import_module(module), names.split(".")
    for one in path:
        owner = getattr(owner, one)
    return owner, name


def arm(signals):
    waiting = list(signals)

    def wrap(place):
        owner, name = owner_of(place)
        original = getattr(owner, name)

        def stopped(*args, **kwargs):
            if waiting and waiting[0][0] == place:
                os.kill(os.getpid(), waiting.pop(0)[1])
            return original(*args, **kwargs)

        setattr(owner, name, stopped)

    for place in dict(signals):
        wrap(place)


def command(case, out):
    os.setsid()
    os.dup2(out, 2)
    end, out = os.pipe() if case.get("closed") else (0, os.open(os.devnull, os.O_WRONLY))
    os.close(end)
    os.dup2(out, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (what it was before may have been a file, with positions)
    os.chdir(case["folder"])
    os.environ.update(case.get("environ", {}))
    for place, value in case.get("set", {}).items():
        setattr(*owner_of(place), value)
    arm(case["signals"])
    sys.argv = ["qlora", *case["argv"]]
    cli.main()


def alive(session):
    """Return the command lines of the processes of a session that have not ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


def run(case):
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        pid = os.fork()
        if pid == 0:
            code = 0
            try:
                command(case, out.fileno())
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        until = time.monotonic() + 5
        while (left := alive(pid)) and time.monotonic() < until:
            time.sleep(0.02)
        out.seek(0)
        return {"code": code, "said": out.read(), "alive": left}


def main():
    torch.set_num_threads(1)
    transformers.AutoModelForCausalLM  # noqa: B018 (imports it)
    print(json.dumps([run(case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
