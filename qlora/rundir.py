"""The run folder: where each file is, and what makes a run complete.

recipe.yaml       the resolved recipe, copied first
environment.json  versions, device, base-model and data hashes
adapter/          PEFT format, tokenizer, chat template; appears by rename, so a folder is either whole or absent;
                  manifest.json in it has the hashes of the others and of the base
adapter-step-20/  what adapter/ was, with its eval.json, before a finished run was continued
checkpoints/      step-20/ and so on, see checkpoints.py; appear by rename too
lock              held by the process that trains here; holds its number
memory.json       layers that were checkpointed, and the memory that was predicted and measured; also after running out
metrics.jsonl     one JSON object a logged step; TensorBoard events in tensorboard/
proof_rows.json   token ids of the rows that export's proof uses, so that it needs no data file
data_report.json
eval.json         the score on the run's own held-out rows, and what they were
evals/            scores on other rows, never taken for the run's own
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import uuid
from pathlib import Path

from .errors import InputError, Interrupted
from .recipe import Recipe


def write_json(path, value):
    """Write `value` to `path` as JSON, atomically; a non-finite number is an error, never `NaN`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path, text):
    """Write `text` to `path` atomically."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sha256(path):
    """Return the hex SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def listed(path):
    """Return the manifest entry of a file: {"bytes", "sha256"}."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def free_disk_bytes(path):
    """Return the free bytes on the disk of `path`, which need not exist yet."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


@contextlib.contextmanager
def new_folder(out, shared=False):
    """Yield `OUT.partial` to fill; rename it to `out` when the block ends well, remove it when it does not.

    Nothing that looks whole is ever at `out`. A leftover of a killed process is replaced. shared: other processes may
    be making the same folder; each fills one of its own, and the first is kept (OSError for the others).
    """
    out = Path(out)
    partial = out.with_name(f"{out.name}{f'.{uuid.uuid4().hex}' if shared else ''}.partial")
    try:
        for leftover in [partial] if shared else _leftovers(out):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another folder") from None
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            fsync(path)
        if out.is_dir():
            out.rmdir()  # an empty folder that the user made; a filled one was refused before
        os.rename(partial, out)
        fsync(out.absolute().parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def fsync(path):
    """Return once the content of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch_folder(beside):
    """Yield a new folder beside `beside`, in the same file system, that is removed at the end of the block."""
    folder = Path(beside).with_name(f"{Path(beside).name}.scratch")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _leftovers(out):
    """Return the temporary folders used to make `out`, where a killed process may have left something."""
    partial = Path(f"{out}.partial")
    return [partial, Path(f"{partial}.scratch")]


def _lock_of(out):
    return Path(f"{out}.partial.lock")


def leftover_bytes(out):
    """Return the bytes that a killed process left beside `out`; making `out` again removes them."""
    files = [path for folder in _leftovers(out) for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_blocks * 512 for path in files)


def refuse_inside(out, inputs):
    """Raise InputError where making `out` would change one of the folders `inputs`."""
    for folder in inputs:
        if folder.resolve() in Path(out).resolve().parents:
            raise InputError(f"{out} is inside {folder}, which is an input; choose another folder")


def refuse_partial(out, inputs):
    """Raise InputError where making `out` would remove one of `inputs`, as the leftover of a killed process."""
    for place in [*_leftovers(out), _lock_of(out)]:
        for path in inputs:
            if place.exists() and place.resolve() in [path.resolve(), *path.resolve().parents]:
                raise InputError(
                    f"{out}: it is written as {place}, which would replace the input {path}; choose another folder"
                )


def refuse_nonempty(out, what):
    """Raise InputError unless `out` is absent or an empty folder."""
    out = Path(out)
    if out.is_symlink():
        raise InputError(f"{out} is a symbolic link to {out.readlink()}; give {what} the folder itself, new or empty")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; {what} never overwrites: remove it or choose another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another folder for {what}")


_held: set = set()  # files of the locks that this process holds


def _let_go():
    """Release the lock in a fork: it belongs to the parent, and must not outlive it."""
    for file in _held:
        file.close()


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def _locked(path, what, remedy):
    """Hold the lock file `path`, with this process' number in it, while the block runs. The lock goes with the process,
    however that ends. The block may remove the file.

    what: is locked by it, for the message. remedy: other than to wait.

    Raises:
        InputError: another process has it; names its number. Or it cannot be written.
    """
    while True:
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{what}: {error.strerror}; choose another folder") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                number = file.read().strip() or "?"
                raise InputError(f"{what} is in use by process {number}; wait for it, or {remedy}") from None
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}; this file system has no locks") from None
            if not os.fstat(file.fileno()).st_nlink:
                continue  # its owner has removed it in between
            _held.add(file)
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            try:
                yield
            finally:
                _held.discard(file)
                fcntl.flock(file, fcntl.LOCK_UN)
            return


@contextlib.contextmanager
def alone(out, what):
    """Hold the lock on making `out` while the block runs; `out` is new or empty when the block begins.

    Raises:
        InputError: another process makes it, or has made it; or its parent cannot be written.
    """
    out = Path(out)
    lock_file = _lock_of(out)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"cannot write {out}: {error.filename} is a file; choose another folder") from None
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another folder") from None
    with _locked(lock_file, out, "choose another folder"):
        try:
            refuse_nonempty(out, what)
            yield
        finally:
            lock_file.unlink(missing_ok=True)


class RunDir:
    """Paths of one run folder."""

    def __init__(self, path):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.environment_file = self.path / "environment.json"
        self.adapter = self.path / "adapter"
        self.metrics_file = self.path / "metrics.jsonl"
        self.memory_file = self.path / "memory.json"
        self.tensorboard = self.path / "tensorboard"
        self.data_report_file = self.path / "data_report.json"
        self.proof_rows_file = self.path / "proof_rows.json"
        self.eval_file = self.path / "eval.json"
        self.evals = self.path / "evals"
        self.checkpoints = self.path / "checkpoints"
        self.lock_file = self.path / "lock"

    @classmethod
    @contextlib.contextmanager
    def create(cls, recipe: Recipe):
        """Yield a new run folder at `recipe.output_dir` that holds the resolved recipe, locked while the block runs.

        Nothing of it is left where the block finds an input wrong, or is interrupted, before training has begun.

        Raises:
            InputError: it holds something already, is a file, or cannot be written; or another process has it.
        """
        run = cls(recipe.output_dir)
        run.refuse_used()
        made = not run.path.exists()
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output_dir {run.path}: {error.strerror}; choose another folder") from None
        with run.locked():
            run.refuse_used()  # another process may have come first
            run.write_recipe(recipe)
            try:
                yield run
            except (InputError, Interrupted):
                if not run.metrics_file.exists():
                    run._remove(made)
                raise

    def _remove(self, folder_too):
        """Remove the files of a run that has not begun to train."""
        mine = (self.recipe_file, self.environment_file, self.data_report_file, self.proof_rows_file, self.memory_file)
        for file in (*mine, self.lock_file):
            file.unlink(missing_ok=True)
        if folder_too and not any(self.path.iterdir()):
            self.path.rmdir()

    def write_recipe(self, recipe):
        try:
            write_text(self.recipe_file, recipe.to_yaml())
        except OSError as error:
            raise InputError(f"output_dir {self.path}: {error.strerror}; choose another folder") from None

    @contextlib.contextmanager
    def locked(self):
        """Have this folder alone while the block runs. The lock goes with the process, however that ends.

        Raises:
            InputError: another process has it; names its number.
        """
        with _locked(self.lock_file, f"output_dir {self.path}", "set output_dir=ANOTHER_FOLDER"):
            yield

    def refuse_used(self):
        """Raise InputError if a new run cannot start here."""
        if self.recipe_file.exists() and not self.adapter.exists():
            there = any(self.checkpoints.glob("step-*"))
            command = f"qlora train {shlex.quote(str(self.recipe_file))} --resume"
            resume = f"resume it with `{command}`, " if there else ""
            raise InputError(
                f"output_dir {self.path} contains an unfinished run; {resume}remove it or set output_dir=ANOTHER_FOLDER"
            )
        if not (self.path.is_dir() and {path.name for path in self.path.iterdir()} == {self.lock_file.name}):
            refuse_nonempty(self.path, "output_dir")

    @classmethod
    def is_run(cls, path):
        """True if `path` is a run folder, finished or not (a model folder has config.json and no recipe.yaml)."""
        return (Path(path) / "recipe.yaml").is_file()

    @classmethod
    def open(cls, path):
        """Return the finished run in `path`; raises InputError if there is none."""
        run = cls(path)
        if not run.path.exists():
            raise InputError(f"no run at {path}; `qlora train RECIPE` makes one")
        if not run.recipe_file.is_file():
            raise InputError(f"{path} is not a run folder: it has no recipe.yaml")
        if not run.adapter.is_dir():
            raise InputError(f"{path} did not finish training: it has no adapter/")
        return run

    def recipe(self):
        return Recipe.load(self.recipe_file)

    def environment(self):
        return self._read(self.environment_file)

    def records(self):
        """Return the objects in metrics.jsonl, one per line; OSError or ValueError if they cannot be read."""
        return [json.loads(line) for line in self.metrics_file.read_text(encoding="utf-8").splitlines()]

    def proof_rows(self):
        return self._read(self.proof_rows_file)

    def _read(self, file):
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: {error}; the run folder is damaged") from None
