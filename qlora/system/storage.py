"""Files and folders that are whole or absent, whatever happens while they are written; locks; hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from pathlib import Path

import filelock

from .errors import SURROUNDINGS, InputError

_PARTIAL = re.compile(r"\.[0-9a-f]{8}\.partial$")
_SECONDS_TO_WRITE = 600  # of a file that is written at once, with a margin
_RUST = re.compile(r"\(os error (\d+)\)")  # as safetensors and tokenizers tell what the system says


def write_json(path, value):
    """Write `value` to `path` as JSON, atomically; a non-finite number is an error, never `NaN`."""
    write_bytes(path, as_json(value))


def as_json(value):
    """Return the bytes that `write_json` writes."""
    return _json(value, indent=2)


def _json(value, indent=None):
    """Return `value` as JSON and a line end, in UTF-8; half a character, which UTF-8 does not have, as an escape."""
    try:
        return (json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode()


def json_line(value):
    """Return `value` as one line of JSON with its end, for readers too that take U+0085, U+2028 and U+2029 for ends of lines."""
    text = _json(value).decode()
    return re.sub("[\x85\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def write_text(path, text):
    """Write `text` to `path` atomically."""
    write_bytes(path, text.encode())


def write_bytes(path, content):
    """Write bytes to `path` atomically. Of several processes that write it at once, the last to end wins, with all of its own."""
    write_together({path: content})


def write_together(contents):
    """Write {path: bytes} of files that belong together: all are on the disk before any old one is touched, so that a full disk
    or a signal changes nothing. A reader never sees a new one beside an old one: the later ones are gone before the first is new.
    """
    partials: dict = {}
    try:
        for path, content in contents.items():
            _remove_leftovers(path)
            partials[path] = partial = Path(f"{path}.{uuid.uuid4().hex[:8]}.partial")
            with _naming(path, partial), open(partial, "xb", buffering=0) as file:
                _write_all(file, content)
                os.fsync(file.fileno())
        _rename(partials)
    except BaseException:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise


def is_leftover(path):
    """Return whether a file has the name of one that is still written, or that a kill has left half written."""
    return _PARTIAL.search(Path(path).name) is not None


def _remove_leftovers(path):
    """Remove what kills have left of earlier writes of `path`; another process may be at a young one."""
    path = Path(path)
    with contextlib.suppress(OSError):  # what is wrong with the folder, the writing says
        for other in path.parent.iterdir():
            of_this = other.name.startswith(f"{path.name}.") and is_leftover(other)
            if of_this and time.time() - other.stat().st_mtime > _SECONDS_TO_WRITE:
                other.unlink()


def _rename(partials):
    """Give every file its name; what has begun is ended before a signal is heard."""
    left = dict(partials)
    try:
        for path in [*partials][1:]:
            Path(path).unlink(missing_ok=True)
        for path, partial in partials.items():
            with _naming(path, partial):
                os.replace(partial, path)
            del left[path]
    except OSError:
        raise
    except BaseException:
        for path, partial in left.items():
            with contextlib.suppress(FileNotFoundError):  # it was renamed, and then the signal came
                os.replace(partial, path)
        raise


@contextlib.contextmanager
def _naming(path, partial=None):
    """Name the file `path` in an error that the system has while it is written, as `partial`: of a full disk it says no more
    than that."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, str(partial)):
            error.filename = str(path)
        raise


def _write_all(file, content):
    """Write bytes to an unbuffered file. With a buffer, what a full disk did not take would be tried again when it is cut."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def add_line(path, value):
    """Write `value` as one more line of JSON at the end of the file `path`, whole or not at all; the file may be new."""
    with _naming(path), open(path, "ab+", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        if start:
            file.seek(-1, os.SEEK_END)
        unended = start > 0 and file.read(1) != b"\n"
        line = json_line(value).encode()
        try:
            _write_all(file, b"\n" * unended + line)
            os.fsync(file.fileno())
        except BaseException:  # a signal too
            file.truncate(start)
            raise


def sha256(path, stop=None):
    """Return the hex SHA-256 of a file, read in pieces of 1 MiB; of its beginning if `stop`, a threading.Event, is set."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while not (stop and stop.is_set()) and (piece := file.read(1 << 20)):
            digest.update(piece)
    return digest.hexdigest()


def listed(path):
    """Return the manifest entry of a file: {"bytes", "sha256"}."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def cache_folder():
    """Return the user's folder for what can be made again: $QLORA_CACHE, or ~/.cache/qlora."""
    own = os.environ.get("QLORA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora"


def free_disk_bytes(path):
    """Return the free bytes on the disk of `path`, which need not exist yet."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


@contextlib.contextmanager
def new_folder(out, shared=False):
    """Yield `OUT.partial` to fill; rename it to `out` when the block ends well, remove it when it does not.

    Nothing that looks whole is ever at `out`. A leftover of a killed process is replaced. shared: other processes may
    be making the same folder; each fills one of its own, and the first is kept (OSError for the others). Of a full disk a
    library written in Rust has an error of its own: it is an OSError here.
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
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        number = _RUST.search(str(error)) if isinstance(error, Exception) and not isinstance(error, OSError) else None
        if number and int(number[1]) in SURROUNDINGS:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(out)) from error
        raise


def fsync(path):
    """Return once the content of a file, or the entries of a folder, are on the disk."""
    windows = os.name == "nt"
    if windows and Path(path).is_dir():
        return  # a folder cannot be opened there
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
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
    return sum(_bytes_on_disk(path.stat()) for path in files)


def _bytes_on_disk(stat):
    return stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size


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


def refuse_nonempty(out, what, but=None):
    """Raise InputError unless `out` is absent or an empty folder, or has the file `but` alone, the lock of who asks; what kills
    have left of files does not count."""
    out = Path(out)
    found = {path for path in out.iterdir() if not is_leftover(path)} if out.is_dir() else set()
    if found and found == {but}:
        return
    if out.is_symlink():
        raise InputError(f"{out} is a symbolic link to {out.readlink()}; give {what} the folder itself, new or empty")
    if found:
        raise InputError(f"{out} is not empty; {what} never overwrites: remove it or choose another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another folder for {what}")


_held: set = set()  # files of the locks that this process holds


def _let_go():
    """Release the lock in a fork: it belongs to the parent, and must not outlive it."""
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked(path, what, remedy):
    """Hold the lock file `path`, with this process' number in it, while the block runs. The lock goes with the process,
    however that ends. The block may remove the file, by `remove_lock`.

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
                free = filelock.lock_descriptor(file.fileno(), blocking=False)
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}; this file system has no locks") from None
            if not free:
                file.seek(1)
                number = file.read().strip() or "?"
                raise InputError(f"{what} is in use by process {number}; wait for it, or {remedy}")
            if not os.fstat(file.fileno()).st_nlink:
                continue  # its owner has removed it in between
            _held.add(file)
            file.truncate(0)
            file.write(f" {os.getpid()}\n")  # others cannot read the first byte on Windows: it is what is locked
            file.flush()
            try:
                yield
            finally:
                _held.discard(file)
                filelock.unlock_descriptor(file.fileno())
            return


def is_locked(path):
    """True if a process holds the lock file `path` at this moment; changes nothing."""
    try:
        with open(path, "rb") as file:
            free = filelock.lock_descriptor(file.fileno(), blocking=False)
            if free:
                filelock.unlock_descriptor(file.fileno())
            return not free
    except OSError:  # none, or it cannot be read, or there are no locks
        return False


def remove_lock(path):
    """Remove a lock file that this process holds. Windows keeps an open file: it stays there, and locks nothing."""
    with contextlib.suppress(PermissionError):
        Path(path).unlink(missing_ok=True)


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
    with locked(lock_file, out, "choose another folder"):
        try:
            refuse_nonempty(out, what)
            yield
        finally:
            remove_lock(lock_file)
