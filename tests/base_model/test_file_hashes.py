"""A base's files are read once, and remembered for as long as they do not change; an export reads them whatever is remembered."""

import collections
import hashlib
import json
import os
import shutil
import time
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import base_model, chat, evaluate, export, train
from qlora.base_model import file_hashes
from qlora.recipe import Model
from qlora.system.errors import InputError
from tests import forked
from tests.base_model.conftest import load


@pytest.fixture
def base(tiny_model, tmp_path, monkeypatch):
    """The folder of a model in three files that nobody has touched for an hour; no cache knows it."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "time", types.SimpleNamespace(time=lambda: time.time() + 3600))
    return shutil.copytree(tiny_model("llama", "150KB"), tmp_path / "model")


@pytest.fixture
def reads(monkeypatch):
    """How often each file was hashed."""
    counts, original = collections.Counter(), file_hashes.sha256

    def counted(path, stop=None):
        counts[path.name] += 1
        return original(path, stop)

    monkeypatch.setattr(file_hashes, "sha256", counted)
    return counts


def found(folder):
    return base_model.find(Model(name_or_path=str(folder)))


def weights(folder):
    return sorted(folder.glob("*.safetensors"))


def remembered_entries(tmp_path):
    return sorted((tmp_path / "cache" / "weights").iterdir())


def change_a_number(path):
    """Change one number, and neither the size nor mtime of the file."""
    before, tensors = path.stat(), load_file(path)
    next(iter(tensors.values())).view(-1)[:1] += 1
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


# ---- over the life of a run ------------------------------------------------------------------------------------------


def test_train_reads_a_base_once_eval_and_chat_not_again_and_export_does(base, reads, make_recipe, tmp_path):
    names = [path.name for path in weights(base)]
    run = train(make_recipe(model={"name_or_path": str(base)})).path
    assert reads == dict.fromkeys(names, 1)
    evaluate(run)
    chat(run, "hello", max_new_tokens=2)
    assert reads == dict.fromkeys(names, 1)
    export(run, tmp_path / "out")
    exported = {path.name for path in weights(tmp_path / "out")} - set(names)
    assert {name: count for name, count in reads.items() if name not in exported} == dict.fromkeys(names, 2)


def test_a_changed_base_is_refused_by_eval_and_by_an_export_that_was_told_otherwise(base, make_recipe, tmp_path):
    run = train(make_recipe(model={"name_or_path": str(base)})).path
    path = weights(base)[0]
    entry = next(e for e in remembered_entries(tmp_path) if json.loads(e.read_text())["stamp"]["path"] == str(path))
    change_a_number(path)
    with pytest.raises(InputError, match=f"not the base .* was trained on \\({path.name} differ"):
        evaluate(run)
    forged = json.loads(entry.read_text())
    assert forged["stamp"]["bytes"] == path.stat().st_size
    del forged["seal"]
    forged["sha256"] = json.loads((run / "environment.json").read_text())["base_model"]["sha256"][path.name]
    forged["seal"] = hashlib.sha256(json.dumps(forged, sort_keys=True).encode()).hexdigest()
    entry.write_text(json.dumps(forged))
    evaluate(run)  # believes what is remembered
    with pytest.raises(InputError, match=f"not the base .* was trained on \\({path.name} differ"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- what is remembered ----------------------------------------------------------------------------------------------


def test_hashes_are_those_of_the_files_and_a_base_of_the_same_object_is_read_once(base, reads):
    checkpoint = found(base)
    expected = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in [base / "config.json", *weights(base)]}
    assert checkpoint.file_hashes() == checkpoint.file_hashes(fully=True) == expected
    assert set(reads.values()) == {1}
    assert found(base).file_hashes() == expected
    assert set(reads.values()) == {1}
    assert found(base).file_hashes(fully=True) == expected
    assert set(reads.values()) == {2}


@pytest.mark.parametrize("change", ["a number", "time", "another file"])
def test_a_file_that_has_changed_is_read_again(base, reads, change):
    before, path = found(base).file_hashes(), weights(base)[0]
    if change == "a number":
        change_a_number(path)
    elif change == "time":
        os.utime(path)
    else:
        shutil.copy2(path, base / "copy")
        (base / "copy").replace(path)
    same = found(base).file_hashes() == before
    assert same == (change != "a number")
    assert sorted(reads.values(), reverse=True) == [2] + [1] * (len(weights(base)) - 1)


def test_a_file_that_was_just_written_is_not_remembered(base, reads, monkeypatch):
    monkeypatch.setattr(file_hashes, "time", time)
    os.utime(weights(base)[0])
    for _ in range(2):
        found(base).file_hashes()
    assert reads[weights(base)[0].name] == 2


def test_a_file_that_changes_while_it_is_read_is_not_remembered(base, monkeypatch, tmp_path):
    original = file_hashes.sha256

    def meanwhile(path, stop=None):
        digest = original(path, stop)
        os.utime(path, ns=(0, 0))
        return digest

    monkeypatch.setattr(file_hashes, "sha256", meanwhile)
    found(base).file_hashes()
    assert not (tmp_path / "cache" / "weights").exists()


def test_a_number_that_is_not_finite_is_refused_from_memory_too(base, reads):
    path = weights(base)[0]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    for _ in range(2):
        with pytest.raises(InputError, match=f"{name}: contains non-finite values"):
            load(base)
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"stamp": 1}', '{"sha256": 5}', "\udcff", "[" * 100_000])
def test_a_broken_entry_is_not_believed_and_replaced(base, reads, tmp_path, content):
    expected = found(base).file_hashes()
    entries = remembered_entries(tmp_path)
    assert len(entries) == len(weights(base))
    for entry in entries:
        entry.write_bytes(content.encode(errors="surrogateescape"))
    assert found(base).file_hashes() == expected
    assert set(reads.values()) == {2}
    assert found(base).file_hashes() == expected
    assert set(reads.values()) == {2}


def test_an_entry_with_one_wrong_letter_is_not_believed(base, reads, tmp_path):
    expected = found(base).file_hashes()
    for entry in remembered_entries(tmp_path):
        text = entry.read_text()
        at = text.index(json.loads(text)["sha256"])
        entry.write_text(f"{text[:at]}{'0' if text[at] != '0' else '1'}{text[at + 1 :]}")
    assert found(base).file_hashes() == expected
    assert set(reads.values()) == {2}


def test_without_a_cache_that_can_be_written_files_are_read_each_time(base, reads, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file" / "below"))
    assert found(base).file_hashes() == found(base).file_hashes()
    assert set(reads.values()) == {2}


TWO = """
import sys, time, types
from pathlib import Path
from qlora.base_model import file_hashes
file_hashes.time = types.SimpleNamespace(time=lambda: time.time() + 3600)
paths = [Path(one) for one in sys.argv[1:]]
expected = file_hashes.read(paths)
for _ in range(100):
    file_hashes.read(paths)
    assert {path: file_hashes.remembered(path) for path in paths} == expected
"""


def test_two_processes_remember_the_same_files_at_once(base, tmp_path):
    command = ["-c", TWO, *weights(base)]
    with forked.Process(*command) as one, forked.Process(*command) as other:
        for process in (one, other):
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    assert len(remembered_entries(tmp_path)) == len(weights(base))
