"""Splits do not leak, nothing is cut or dropped in silence, and the report counts what happened."""

import collections

import pytest

from qlora import data
from qlora.errors import InputError
from qlora.recipe import Data
from tests.conftest import CONVERSATIONS, messages, write_jsonl


@pytest.fixture
def file(tmp_path):
    rows = [{"messages": messages(turns)} for turns in CONVERSATIONS]
    return write_jsonl(tmp_path / "d.jsonl", rows * 3)


def encode(path, tokenizer, **settings):
    dropped = collections.defaultdict(collections.Counter)
    sources = data.read([str(path)])
    section = Data(train=[str(path)], **settings)
    return data.encode(sources[0].conversations, tokenizer, section, dropped)[1], sources, dropped


def test_copies_of_a_row_are_never_on_both_sides(file):
    train, held_out = data.hold_out(data.read([str(file)]), 0.25, seed=1)
    texts = [{c.messages[0]["content"] for c in side} for side in (train, held_out)]
    assert texts[0].isdisjoint(texts[1])
    assert (len(train), len(held_out)) == (54, 18)


def test_the_split_is_the_same_for_the_same_seed_only(file):
    sources = data.read([str(file)])
    first, again, other = (data.hold_out(sources, 0.25, seed=seed)[1] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_split_that_leaves_nothing_is_refused(tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", [{"messages": messages(CONVERSATIONS[0])}] * 5)
    with pytest.raises(InputError, match="leaves no training rows"):
        data.hold_out(data.read([str(file)]), 0.5, seed=1)


def test_bad_rows_are_reported_together_with_file_and_line(tmp_path):
    rows = [{"messages": messages(CONVERSATIONS[0])}, {"text": "x"}, {"messages": []}]
    file = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(InputError) as caught:
        data.read([str(file)])
    message = str(caught.value)
    assert f"{file} has 2 problems" in message
    assert "line 2  keys text fit no known shape" in message
    assert "line 3  messages is an empty list" in message


def test_rows_over_max_length_are_an_error_with_their_lines_by_default(file, tokenizer):
    with pytest.raises(InputError, match=r"d.jsonl line 1  \d+ tokens, data.max_length is 8"):
        encode(file, tokenizer, max_length=8)


def test_the_remedy_is_said_however_many_rows_are_wrong(file, tokenizer):
    with pytest.raises(InputError, match=r"and 52 more\n  raise data.max_length, or set data.overlong=drop"):
        encode(file, tokenizer, max_length=8)


def test_dropped_rows_are_counted_by_reason(tmp_path, tokenizer):
    long = [("user", "x " * 200), ("assistant", "A")]
    file = write_jsonl(tmp_path / "d.jsonl", [{"messages": messages(turns)} for turns in [*CONVERSATIONS, long]])
    examples, sources, dropped = encode(file, tokenizer, max_length=100, overlong="drop")
    report = data.report(sources, examples, dropped, {2}, rows_per_step=10)
    assert len(examples) == len(CONVERSATIONS) == report["rows"]
    assert report["sources"][0]["rows_dropped"] == 1
    assert report["sources"][0]["rows_kept"] == len(CONVERSATIONS)
    assert report["sources"][0]["reasons"] == {"longer than max_length 100": 1}


def test_dropping_every_row_is_an_error(file, tokenizer):
    with pytest.raises(InputError, match="no row is left"):
        encode(file, tokenizer, max_length=8, overlong="drop")


def test_the_report_counts_tokens_and_stops(file, tokenizer):
    examples, sources, dropped = encode(file, tokenizer)
    report = data.report(sources, examples, dropped, {2}, rows_per_step=10)
    assert report["tokens"]["total"] == sum(len(example.input_ids) for example in examples)
    assert report["tokens"]["trained"] == sum(label != -100 for example in examples for label in example.labels)
    assert report["ends_with_stop_token"] == 1.0
    assert report["steps_per_epoch"] == 8  # 72 rows
    assert report["sources"][0]["format"] == "messages"
    never = data.report(sources, examples, dropped, {5}, rows_per_step=10)
    assert never["ends_with_stop_token"] == 0.0
