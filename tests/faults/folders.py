"""Ways to break a folder of models or adapters, and what has to hold whichever verb finds it."""

import contextlib
import hashlib
import json
import sys

import pytest
from safetensors.torch import load_file, save_file

from qlora.system.errors import InputError

WEB_PAGE = "\n<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 134215\n"
DEEP = '{"a":' * 100_000


def writing(name, content):
    """Return a function that puts `content` (text or bytes) in the place of a folder's file."""

    def write(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def cutting(name, count):
    """Return a function that takes the last `count` bytes off a folder's file."""

    def cut(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-count])

    return cut


def removing(*names):
    def remove(folder):
        for name in names:
            (folder / name).unlink()

    return remove


def setting(name, **changes):
    """Return a function that changes fields of a JSON file; ... takes one out."""

    def change(folder):
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return change


def with_tensors(name, change):
    """Return a function that writes what `change` makes of a file's {name: tensor}."""

    def rewrite(folder):
        tensors = load_file(folder / name)
        save_file(change(tensors) or tensors, folder / name, metadata={"format": "pt"})

    return rewrite


def all_of(*changes):
    def change(folder):
        for one in changes:
            one(folder)

    return change


def digests(folder):
    """Return {path: sha256 of its content} of all files under a folder, links as where they lead."""
    return {
        path: str(path.readlink()) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


class _NoStdin:
    def close(self):
        """What a process that is forked does with it."""

    def __getattr__(self, name):
        raise AssertionError(f"stdin.{name} was asked for")


@contextlib.contextmanager
def refused(expected, inputs, outputs, canary):
    """Hold that the block ends with one message that matches `expected`, leaves `inputs` (folders) as they were and
    nothing whole at `outputs`, asks nothing, and runs no code that would make the file `canary`."""
    before = [digests(folder) for folder in inputs]
    stdin, sys.stdin = sys.stdin, _NoStdin()
    try:
        with pytest.raises(InputError, match=expected) as caught:
            yield
    finally:
        sys.stdin = stdin
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) <= 23  # 20 rows or tensors are named, the others counted
    assert [digests(folder) for folder in inputs] == before
    assert not canary.exists()
    for folder in outputs:
        assert not (folder / "adapter").exists()
        assert not (folder / "config.json").exists()
