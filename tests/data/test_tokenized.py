"""The cache sees every change, several processes make what one makes, and memory does not grow with the file."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.data import cache, sources, tokenized
from qlora.data.encoder import Settings
from qlora.data.supervised import Supervised
from qlora.recipe import Source
from qlora.system import events
from qlora.system.errors import InputError
from tests.conftest import CONVERSATIONS, make_tokenizer, messages, write_jsonl

SETTINGS = {
    "format": "auto",
    "columns": None,
    "train_on": "assistant",
    "max_length": 256,
    "overlong": "error",
    "on_bad_row": "error",
}
ROWS = [{"messages": messages(turns)} for turns in CONVERSATIONS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    cache.folder.cache_clear()
    yield tmp_path / "cache" / "tokenized"
    cache.folder.cache_clear()


@pytest.fixture
def made(monkeypatch):
    """Count how often rows were tokenized, and not found in the cache."""
    calls = []
    write = tokenized._write
    monkeypatch.setattr(tokenized, "_write", lambda *args: (calls.append(1), write(*args)))
    return calls


def tokenize(path, tokenizer, pick=None, num_proc=1, source=None, **settings):
    file = sources.File(str(path), source or Source(path=str(path)))
    encoder = Supervised(tokenizer, Settings(**{**SETTINGS, **settings}))
    return tokenized.tokenize(file, encoder, 1.0, pick, num_proc)


def test_a_second_time_nothing_is_tokenized(tmp_path, tokenizer, made):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    first, second = tokenize(path, tokenizer), tokenize(path, tokenizer)
    assert len(made) == 1
    assert [first.example(n) for n in range(24)] == [second.example(n) for n in range(24)]
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    assert tokenize(copy, tokenizer).path == str(copy)
    assert len(made) == 1  # it is the contents that count


def test_every_change_is_seen(tmp_path, tokenizer_json, made):
    tokenizer = make_tokenizer(tokenizer_json)
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    tokenize(path, tokenizer)
    expected = 1
    for change in (
        {"train_on": "all"},
        {"max_length": 255},
        {"overlong": "drop"},
        {"on_bad_row": "skip"},
        {"pick": frozenset({1, 2})},
        {"format": "messages"},
    ):
        tokenize(path, tokenizer, **change)
        expected += 1
        assert len(made) == expected, change
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", "\n\n", 1)
    tokenize(path, tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenize(path, tokenizer)
    path.write_text(path.read_text().replace("What", "what", 1))
    tokenize(path, tokenizer)
    assert len(made) == expected + 3


def test_a_change_of_the_code_is_seen(tmp_path, tokenizer, made, monkeypatch):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    tokenize(path, tokenizer)
    monkeypatch.setattr(tokenized, "_code_digest", lambda: "another")
    tokenize(path, tokenizer)
    assert len(made) == 2


def test_processes_make_what_one_process_makes(tmp_path, tokenizer, monkeypatch, own_cache):
    monkeypatch.setattr(tokenized, "_POOL_FROM", 0)
    path = write_jsonl(tmp_path / "d.jsonl", [*ROWS * 60, {"words": 1}, *ROWS * 20])
    stored = []
    for num_proc in (1, 3):
        part = tokenize(path, tokenizer, num_proc=num_proc, on_bad_row="skip")
        (folder,) = own_cache.iterdir()
        stored.append({file.name: file.read_bytes() for file in folder.iterdir()})
        assert part.summary["rows_kept"] == 24 * 80
        assert part.rows["line"].tolist() == [line for line in range(1, 24 * 80 + 2) if line != 24 * 60 + 1]
        import shutil

        shutil.rmtree(folder)
    assert stored[0] == stored[1]


@pytest.mark.parametrize("damage", ["no file", "cut off", "no JSON", "other keys"])
def test_a_damaged_folder_is_made_again(tmp_path, tokenizer, made, own_cache, damage):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    before = tokenize(path, tokenizer)
    expected = [before.example(n) for n in range(24)]
    (folder,) = own_cache.iterdir()
    tokens = folder / f"{next(iter(Supervised.ARRAYS))}.bin"
    if damage == "no file":
        tokens.unlink()
    elif damage == "cut off":
        tokens.write_bytes(tokens.read_bytes()[:-8])
    else:
        (folder / "summary.json").write_text("{" if damage == "no JSON" else "{}")
    again = tokenize(path, tokenizer)
    assert len(made) == 2
    assert [again.example(n) for n in range(24)] == expected
    assert again.summary == before.summary


def test_two_processes_that_make_the_same_do_not_meet(tmp_path, tokenizer, own_cache, monkeypatch):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    write, inside = tokenized._write, []

    def slow(*args):
        write(*args)
        if not inside:  # while the first is about to end, a second begins and ends
            inside.append(1)
            inside.append(tokenize(path, tokenizer))

    monkeypatch.setattr(tokenized, "_write", slow)
    first = tokenize(path, tokenizer)
    assert [first.example(n) for n in range(24)] == [inside[1].example(n) for n in range(24)]
    assert len(list(own_cache.iterdir())) == 1


def test_rows_that_are_refused_leave_nothing_in_the_cache(tmp_path, tokenizer, own_cache):
    path = write_jsonl(tmp_path / "d.jsonl", [*ROWS, {"words": 1}])
    with pytest.raises(InputError, match="line 25"):
        tokenize(path, tokenizer)
    assert list(own_cache.iterdir()) == []


def test_what_was_not_used_for_a_month_is_forgotten(tmp_path, tokenizer, own_cache, made):
    old, used = (write_jsonl(tmp_path / f"{n}.jsonl", ROWS[:n]) for n in (3, 4))
    for path in (old, used):
        tokenize(path, tokenizer)
    for folder in own_cache.iterdir():
        os.utime(folder, (0, 0))
    tokenize(used, tokenizer)
    tokenize(write_jsonl(tmp_path / "new.jsonl", ROWS[:5]), tokenizer)
    assert len(made) == 3
    tokenize(used, tokenizer)
    assert len(made) == 3
    assert len(list(own_cache.iterdir())) == 2


def test_without_a_folder_that_can_be_written_it_works_all_the_same(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file" / "below"))
    cache.folder.cache_clear()
    assert len(tokenize(write_jsonl(tmp_path / "d.jsonl", ROWS), tokenizer).rows) == 24


def test_control_tokens_and_long_rows_keep_their_ids_on_disk(tmp_path, tokenizer):
    from tests.conftest import encode

    turns = [("user", "Say <|im_end|>!"), ("assistant", "No <|im_start|> 日本 🙂.")]
    part = tokenize(write_jsonl(tmp_path / "d.jsonl", [ROWS[0], {"messages": messages(turns)}]), tokenizer)
    assert part.example(1) == encode(tokenizer, messages(turns))


def test_a_data_file_that_cannot_be_read_is_named_and_not_the_cache(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    monkeypatch.setattr(tokenized, "CHUNK", 10)
    with (
        pytest.raises(InputError, match=r"d\.jsonl: cannot be read and tokenized: No such file") as caught,
        events.heard_by(lambda event: path.unlink(missing_ok=True) if event.done else None),
    ):
        tokenize(path, tokenizer)
    assert "QLORA_CACHE" not in str(caught.value)

    write_jsonl(path, ROWS)
    monkeypatch.setattr(tokenized, "_POOL_FROM", 0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 4, limits[1]))
    try:
        with pytest.raises(InputError, match=r"d\.jsonl: cannot be read and tokenized: Too many open files"):
            tokenize(path, tokenizer, num_proc=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_cache_that_cannot_be_written_has_its_remedy(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(InputError, match="set QLORA_CACHE to a folder with room"):
            tokenize(path, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


MEASURE = """
import resource, sys
sys.path.insert(0, {root!r})
from qlora.data import Rows, pack, sources, tokenized
from qlora.data.encoder import Settings
from qlora.data.supervised import Supervised
from qlora.recipe import Source
from tests.conftest import make_tokenizer
from tokenizers import Tokenizer
file = sources.File({path!r}, Source(path={path!r}))
tokenizer = make_tokenizer(Tokenizer.from_str(open({tokenizer!r}).read()))
encoder = Supervised(tokenizer, Settings("auto", None, "all", 256, "error", "error"))
part = tokenized.tokenize(file, encoder, num_proc=1)
rows = Rows([part])
assert any(label >= 0 for label in pack(rows, 256)[0].labels)
print(len(rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, tokenizer_json):
    (tmp_path / "t.json").write_text(tokenizer_json.to_str())
    line = json.dumps({"text": "What is 3 plus 4? " * 8}) + "\n"
    peaks = []
    for count in (2_000, 100_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text(line * count)
        root, tokenizer = str(Path(__file__).parents[2]), str(tmp_path / "t.json")
        code = MEASURE.format(root=root, path=str(path), tokenizer=tokenizer)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        rows, peak = map(int, done.stdout.split())
        assert rows == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 60  # MiB, for 98,000 rows more: 15 MB of text and 20 MB of ids lie on disk
