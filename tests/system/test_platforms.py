"""On Windows and macOS the package imports and keeps its files whole, without what only Linux or Unix has."""

import builtins

from qlora.system import memory
from tests import forked

# Libraries have been imported when the names go: this is about qlora's own use of them.
AS_ON_WINDOWS = """
import importlib, os, pkgutil, signal, sys
import qlora
modules = [found.name for found in pkgutil.walk_packages(qlora.__path__, "qlora.") if found.name != "qlora.__main__"]
for name in modules:
    importlib.import_module(name)
for name in [name for name in sys.modules if name.split(".")[0] == "qlora"]:
    del sys.modules[name]
for name in "fcntl resource pwd grp termios tty pty".split():
    sys.modules[name] = None
for module, names in {
    os: "O_DIRECT RWF_NOWAIT preadv pwritev pread pwrite sched_getaffinity register_at_fork fork getuid geteuid statvfs "
        "killpg setsid getpgid fchmod fchown posix_fadvise posix_fallocate mkfifo uname wait4",
    signal: "SIGHUP SIGALRM SIGVTALRM SIGKILL SIGUSR1 setitimer getitimer alarm pthread_kill ITIMER_REAL ITIMER_VIRTUAL",
}.items():
    for name in names.split():
        delattr(module, name)
for name in modules:
    importlib.import_module(name)
print(len(modules))
"""
# no preadv, no O_DIRECT, no flock by name, no at-fork hook, no timers
WORKS = """
from pathlib import Path
import torch
from qlora import base_model
from qlora.exporter import reader, writer
from qlora.recipe import Model
from qlora.system import bounded, signals, storage
from qlora.system.errors import InputError

with storage.alone("out", "export"), storage.new_folder("out") as folder:
    try:
        with storage.locked("out.partial.lock", "out", "choose another"):
            raise SystemExit("two hold one lock")
    except InputError as error:
        assert f"process {os.getpid()};" in str(error), error
    tensor = torch.arange(3_000_000, dtype=torch.float32).view(-1, 3)  # more than a buffer, and no whole page
    writer.write(folder, [writer.Spec("w", tensor.shape, tensor.dtype)], lambda name: [tensor[:7], tensor[7:]], 2**30)
    (folder / "config.json").write_text('{"model_type": "llama"}')
assert sorted(path.name for path in Path(".").iterdir()) == ["out"]
with reader.Reader(base_model.find(Model(name_or_path="out"))) as read:
    assert torch.equal(read.whole("w"), tensor)
    assert torch.equal(read.rows("w")[5:900_000], tensor[5:900_000])
assert bounded.call(lambda: 7) == 7
with signals.handled():
    pass
"""


def test_every_module_imports_and_files_are_whole_without_what_windows_lacks(tmp_path):
    done = forked.run("-c", AS_ON_WINDOWS + WORKS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80


def test_memory_is_measured_where_there_is_no_proc(monkeypatch):
    real = memory.anonymous_bytes()

    def no_proc(path, *args, **kwargs):
        if str(path) == "/proc/self/status":
            raise FileNotFoundError(path)
        return builtin(path, *args, **kwargs)

    builtin = builtins.open
    monkeypatch.setattr(builtins, "open", no_proc)
    assert real / 2 < memory.anonymous_bytes() < 20 * real  # with mapped files
