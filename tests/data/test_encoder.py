"""Another kind of examples goes the way of the first: read, tokenized, cached, counted, held out and read back."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from qlora import data
from qlora.data import formats, sources, tokens
from qlora.data.encoder import Encoded, Encoder, TooLong
from qlora.data.supervised import Supervised
from qlora.recipe import Data
from qlora.system.errors import InputError
from tests.conftest import write_jsonl

CLASSES = ["bad", "good"]


@dataclass(frozen=True)
class Labelled:
    input_ids: list
    label: int


class Classification:
    """A text and one label: rows of format text, with a label beside it."""

    ARRAYS: ClassVar = {"tokens": "<i4"}
    NUMBERS: ClassVar = {"label": "<i2"}
    COUNTS: ClassVar = tuple(f"rows_{name}" for name in CLASSES)
    LENGTH = None

    open_source, not_read = staticmethod(sources.open_source), staticmethod(sources.not_read)

    def __init__(self, tokenizer, settings):
        self.tokenizer, self.settings = tokenizer, settings

    @staticmethod
    def refuse_columns(mapped):
        pass

    refuse_table = refuse_columns

    def identity(self):
        return [tokens.identity(self.tokenizer), CLASSES]

    def read(self, value):
        if value.get("label") not in CLASSES:
            raise ValueError(f"label is {value.get('label')!r}, not one of {', '.join(CLASSES)}")
        name, said = formats.read({key: inner for key, inner in value.items() if key != "label"})
        return name, (said, value["label"])

    def encode(self, value):
        name, (said, label) = self.read(value)
        ids = tokens.tokenize(self.tokenizer, said.text).ids
        if len(ids) > self.settings.max_length:
            raise TooLong(f"{len(ids)} tokens", "longer than max_length")
        return Encoded(name, said.key(), [Labelled(ids, CLASSES.index(label))], said.unused, {f"rows_{label}": 1})

    def stored(self, example):
        return (example.input_ids,), (example.label,)

    def restored(self, arrays, numbers):
        return Labelled(arrays[0].tolist(), int(numbers["label"]))


TEXTS = [{"text": f"I saw it {n} times.", "label": CLASSES[n % 3 == 0], "id": n} for n in range(12)]


@pytest.fixture
def load(tmp_path, tokenizer, monkeypatch):
    def load(rows, encoder: type[Encoder] = Classification, **settings):
        section = Data(train=str(write_jsonl(tmp_path / "rows.jsonl", rows)), **settings)
        return data.Rows(data.load(section.train, tokenizer, section, seed=0, encoder=encoder))

    return load


def test_examples_come_back_from_the_disk_as_they_were_made(load, tokenizer):
    rows, again = load(TEXTS), load(TEXTS)
    expected = [Labelled(tokenizer(row["text"]).input_ids, CLASSES.index(row["label"])) for row in TEXTS]
    assert [*rows] == [*again] == expected
    assert rows.numbers("label").tolist() == [example.label for example in expected]
    assert rows.lengths.tolist() == [len(example.input_ids) for example in expected]


def test_its_rows_are_counted_dropped_and_refused_as_others_are(load):
    long, odd = {"text": "again " * 99, "label": "bad"}, {"text": "So so.", "label": "middling"}
    summary = load([*TEXTS, long, odd], max_length=64, overlong="drop", on_bad_row="skip").parts[0].summary
    assert (summary["format"], summary["rows_read"], summary["rows_kept"]) == ("text", 14, 12)
    assert summary["reasons"] == {"longer than max_length": 1, "label is '...', not one of bad, good": 1}
    assert (summary["rows_bad"], summary["rows_good"], summary["unused"]) == (8, 4, {"id": 12})
    assert summary["largest_token"] == max(max(example.input_ids) for example in load(TEXTS))
    with pytest.raises(InputError, match="line 13  label is 'middling', not one of bad, good"):
        load([*TEXTS, odd])


def test_its_rows_are_held_out_weighted_and_batched_as_others_are(load):
    rows = load(TEXTS * 2)
    train, held_out = data.hold_out(rows, 0.25, seed=1)
    assert (len(train), len(held_out)) == (18, 6)
    assert data.copies(train, held_out) == {"duplicates": 9, "eval_rows_in_training": 0}
    batches = data.Batches(rows, rows.lengths, tokens=64, seed=0)
    seen = np.concatenate([batches.rows(index) for index in range(len(batches))])
    assert sorted(seen.tolist()) == [*range(24)]
    assert data.conversations(held_out)[0][1] in CLASSES


def test_two_kinds_of_examples_of_one_file_do_not_meet_in_the_cache(load):
    plain = [{"text": row["text"], "label": "good"} for row in TEXTS]
    assert isinstance(load(plain)[0], Labelled)
    assert isinstance(load(plain, Supervised)[0], data.Example)
