"""Export a run many times, each killed with SIGKILL at a random moment; print what each left behind, as JSON.

    python tests/faults/killed_exports.py RUN OUT COUNT SEED

The libraries are imported once and every export is a fork of this process, which has computed nothing yet.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import peft  # noqa: F401 (so that the forks need not import it)
import transformers  # noqa: F401

from qlora.commands.export import export


def start(run, out):
    """Return the pid of a fork that exports."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            export(run, out)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid


def main():
    run, out, count, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    for _ in range(2):  # the second time every file is in the cache, as it will be
        shutil.rmtree(out.with_name("whole"), ignore_errors=True)
        begin = time.monotonic()
        assert os.waitpid(start(run, out.with_name("whole")), 0)[1] == 0
        whole = time.monotonic() - begin
    moments, left = random.Random(seed), []
    for _ in range(count):
        pid = start(run, out)
        time.sleep(moments.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        left.append(sorted(path.name for path in out.parent.iterdir() if path.name.startswith(out.name)))
        if out.exists():  # it was done in time
            shutil.rmtree(out)
    done = os.waitpid(start(run, out), 0)[1] == 0
    print(json.dumps({"left": left, "done": done, "whole": whole}))


if __name__ == "__main__":
    main()
