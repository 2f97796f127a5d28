"""Commands and programs as processes of their own, at a tenth of the time.

Each is a fork of one process that has imported the libraries and computed nothing yet; importing them takes 7 s. What a process
of its own is about is the same (signals, exit codes, limits, files, locks), but not the imports and the variables that libraries
read when they are imported: tests of those start Python anew.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

from tests import outlines

ROOT = Path(__file__).parents[1]
_PROCESSES = multiprocessing.get_context("forkserver")
_LIBRARIES = [
    "bitsandbytes", "datasets", "peft", "peft.tuners.lora.bnb", "psutil", "torch.utils.tensorboard", "transformers",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "transformers.generation", "trl",
    "trl.trainer.sft_trainer", "qlora.planner", "tests.forked",
]  # fmt: skip


def run(*arguments, stdin="", timeout=300, **surroundings):
    """Return what came of `qlora ARGUMENTS`, or of `python ARGUMENTS` where they begin with -c or a script, as
    subprocess.run does; with `cwd` and `environ`, which replaces the environment."""
    with Process(*arguments, stdin=stdin, **surroundings) as process:
        out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.arguments, process.returncode, out, err)


class Process:
    """A command that runs; with the names of subprocess.Popen."""

    def __init__(self, *arguments, stdin="", cwd=None, environ=None, out=None, err=None):
        """out, err: a FIFO or a terminal, in place of files that communicate() reads."""
        self.arguments = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory()
        there = Path(self._folder.name)
        files = [there / "in", Path(out or there / "out"), Path(err or there / "err")]
        files[0].write_text(stdin, encoding="utf-8")
        _, self._out, self._err = files
        surroundings = (str(cwd or Path.cwd()), dict(os.environ if environ is None else environ))
        _ensure_libraries()
        self._process = _PROCESSES.Process(target=_start, args=(self.arguments, files, *surroundings))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout):
        """Return the exit code; minus a signal's number, if that ended the process."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """Return all that was printed to (stdout, stderr)."""
        self.wait(timeout)
        return self._out.read_text(encoding="utf-8"), self._err.read_text(encoding="utf-8")

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def end(self):
        self.kill()
        self._process.join()
        self._folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.end()


def _ensure_libraries():
    """Start the process that the others are forks of; in the checkout, whose `tests` it imports."""
    _PROCESSES.set_forkserver_preload(_LIBRARIES)
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(before)


def _start(arguments, files, cwd, environ):
    """Be what `arguments` say: in a process that has forked for this."""
    gc.freeze()
    for number, (file, mode) in enumerate(zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)):
        opened = os.open(file, mode)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    from qlora import planner

    if outlines.FOLDER in environ:
        planner.outline = outlines.kept(planner.outline, Path(environ[outlines.FOLDER]))
    first, *rest = arguments
    if first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    elif first.endswith(".py"):
        sys.argv, sys.path[0] = arguments, str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")
    else:
        sys.argv = ["qlora", *arguments]
        runpy.run_module("qlora", run_name="__main__", alter_sys=True)
