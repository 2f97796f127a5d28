"""Files are whole or absent on a disk that is really full, and the message names them."""

import errno
import json
import os

import pytest

from qlora.system import storage
from qlora.system.errors import InputError
from tests import forked
from tests.faults.test_training import OWN_DISK

FULL = """
import json
from safetensors.numpy import save_file
import numpy as np
from tokenizers import Tokenizer
from qlora.system import storage
disk, said = Path(sys.argv[2]), []

def tried(action):
    try:
        action()
        said.append("written")
    except Exception as error:
        said.append([type(error).__name__, getattr(error, "errno", None), str(getattr(error, "filename", None))])

lines, file = 0, disk / "lines.jsonl"
while not said:
    before = lines
    try:
        storage.add_line(file, {"n": lines, "text": "x" * 1500})
        lines += 1
    except OSError as error:
        said.append([type(error).__name__, error.errno, error.filename])
whole = [json.loads(line)["n"] for line in file.read_text().splitlines()] == list(range(lines))

tried(lambda: storage.write_json(disk / "file.json", {"text": "x" * 50_000}))

def folder(fill):
    with storage.new_folder(disk / "new") as new:
        fill(new)

tried(lambda: folder(lambda new: save_file({"a": np.zeros(100_000)}, new / "a.safetensors")))
tried(lambda: folder(lambda new: Tokenizer.from_str(sys.argv[3]).save(str(new / "tokenizer.json"))))
print(json.dumps([lines, whole, said, sorted(path.name for path in disk.iterdir())]))
"""


def test_what_a_full_disk_does_not_take_is_not_left_half_written(tmp_path, tokenizer_json):
    """A buffer would be written again when the file is cut or closed, and leave half a line."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = forked.run("-c", f"NUM_BYTES = 20_000\n{OWN_DISK}{FULL}", "-", disk, tokenizer_json.to_str())
    if done.returncode == 99:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 0, done.stderr
    lines, whole, said, left = json.loads(done.stdout)
    full = ["OSError", errno.ENOSPC]
    assert lines > 3
    assert whole
    assert said == [[*full, str(disk / name)] for name in ("lines.jsonl", "file.json", "new", "new")]
    assert left == ["lines.jsonl"]


def test_other_errors_of_a_folder_that_is_made_are_as_they_were(tmp_path):
    with pytest.raises(ValueError, match="os error"), storage.new_folder(tmp_path / "new"):
        raise ValueError("no os error (os error 99999)")
    assert list(tmp_path.iterdir()) == []


def test_two_that_write_one_file_at_once_do_not_share_a_half_written_one(tmp_path, monkeypatch):
    """Two `qlora eval` of one run: the second writes all of its file after the first has written its own, before the rename."""
    file, flush, left = tmp_path / "eval.json", os.fsync, []

    def meanwhile(descriptor):
        flush(descriptor)
        if not left:
            left.append(None)
            storage.write_json(file, {"of": "the second"})
            left[0] = json.loads(file.read_text())

    monkeypatch.setattr(storage.os, "fsync", meanwhile)
    storage.write_json(file, {"of": "the first", "longer": "x" * 100})
    assert left == [{"of": "the second"}]
    assert json.loads(file.read_text())["of"] == "the first"
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path):
    for file, kind in ((tmp_path / "missing" / "file.json", errno.ENOENT), (tmp_path / "folder", errno.EISDIR)):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(OSError, match="directory") as refused:
            storage.write_json(file, {})
        assert (refused.value.errno, refused.value.filename) == (kind, str(file))
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def files_of(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_that_belong_together_are_all_new_or_all_as_they_were(tmp_path, monkeypatch):
    answers, score = tmp_path / "answers", tmp_path / "score"
    storage.write_together({answers: b"old", score: b"old"})
    write = storage._write_all

    def full(file, content):
        if file.name.startswith(str(score)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, content)

    monkeypatch.setattr(storage, "_write_all", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        storage.write_together({answers: b"new", score: b"new"})
    assert raised.value.filename == str(score)
    assert files_of(tmp_path) == {"answers": "old", "score": "old"}


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("before", [True, False])
def test_a_signal_between_their_renames_is_heard_after_them(tmp_path, monkeypatch, at, before):
    answers, score = tmp_path / "answers", tmp_path / "score"
    storage.write_together({answers: b"old", score: b"old"})
    calls = iter(range(99))

    def interrupted(original):
        def call(*arguments, **more):
            now = next(calls) == at
            if now and before:
                raise KeyboardInterrupt
            found = original(*arguments, **more)
            if now:
                raise KeyboardInterrupt
            return found

        return call

    monkeypatch.setattr(storage.Path, "unlink", interrupted(storage.Path.unlink))
    monkeypatch.setattr(storage.os, "replace", interrupted(os.replace))
    with pytest.raises(KeyboardInterrupt):
        storage.write_together({answers: b"new", score: b"new"})
    assert files_of(tmp_path) == {"answers": "new", "score": "new"}


def test_what_kills_left_of_a_file_is_removed_when_it_is_written_again_and_fills_no_folder(tmp_path):
    path, mine = tmp_path / "a.json", tmp_path / "b.json.0123abcd.partial"
    old, young = (tmp_path / f"a.json.{digits}.partial" for digits in ("0a0b0c0d", "11111111"))
    for leftover in (mine, old, young):
        leftover.write_text("half")
    os.utime(old, (0, 0))
    os.utime(mine, (0, 0))
    storage.refuse_nonempty(tmp_path, "output_dir")
    storage.write_text(path, "whole")
    # the young one may be written now, and mine is of another file
    assert files_of(tmp_path) == {"a.json": "whole", young.name: "half", mine.name: "half"}
    with pytest.raises(InputError, match="is not empty"):
        storage.refuse_nonempty(tmp_path, "output_dir")
