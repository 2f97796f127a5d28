"""Classes of rows: which there are, what a label says, how they are read from every kind of file, and what is refused."""

import csv
import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from qlora import data
from qlora.data import labels
from qlora.pages.data import altered
from qlora.recipe import Data
from qlora.system.errors import InputError
from tests.classifiers import make_tokenizer

ROWS = [("很好", "pos"), ("a fine film", "pos"), ("很差 !", "neg"), ("awful", "neg"), ("awful", "neg")]


def section(path, **fields):
    return Data(train=str(path), **fields)


def loaded(path, eval_of=None, **fields):
    """Return the data.Rows of a file, its classes found as a training finds them."""
    whole = section(path, **fields)
    names = fields.get("labels") or labels.found(whole.train, whole)
    whole = section(path, **{**fields, "labels": names})
    source = section(eval_of, **fields).train if eval_of else whole.train
    return data.Rows(data.load(source, make_tokenizer(), whole, seed=0, encoder=data.LabelledText)), names


def write(path, rows, names=("text", "label")):
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize(("rows", "expected"), [
    (ROWS, ["neg", "pos"]),
    ([(text, int(label == "pos")) for text, label in ROWS], ["0", "1"]),
])  # fmt: skip
def test_the_same_rows_in_any_file_are_the_same_examples(tmp_path, suffix, rows, expected):
    found, names = loaded(write(tmp_path / f"rows.{suffix}", rows))
    tokenizer = make_tokenizer()
    assert names == expected
    assert [one.label for one in found] == [1, 1, 0, 0, 0]
    assert [one.input_ids for one in found] == [tokenizer(text).input_ids for text, _ in rows]


def test_classes_are_ordered_by_the_recipe_by_number_or_by_the_alphabet(tmp_path):
    many = [(f"text {n}", n) for n in (10, 9, 2, 10, 9, 2)]
    assert loaded(write(tmp_path / "numbers.jsonl", many))[1] == ["2", "9", "10"]
    found, names = loaded(write(tmp_path / "names.jsonl", ROWS), labels=["pos", "neg"])
    assert (names, [one.label for one in found]) == (["pos", "neg"], [0, 0, 1, 1, 1])
    numbered = [("bad", "0"), ("good", "1")]
    found, _ = loaded(write(tmp_path / "by_place.csv", numbered), labels=["negative", "positive"])
    assert [one.label for one in found] == [0, 1]


@pytest.mark.parametrize(("label", "name"), [("pos", "pos"), (3, "3"), (3.0, "3"), (True, "true"), ("0", "0")])
def test_a_label_is_a_name_or_a_number(label, name):
    assert labels.said(label) == name


@pytest.mark.parametrize(
    ("label", "wrong"),
    [(None, "is empty"), ("  ", "is empty"), (math.nan, "is empty"), (-1, "label is -1, which marks rows without"),
     ("-1", "label is -1, which marks"), ("pos\nneg", r"label is 'pos\\nneg', with the character U\+000A: a class is"),
     ("\x1b[31mpos", r"with the character U\+001B"), ("pos\u2028", r"with the character U\+2028"),
     (0.5, "is 0.5, a fraction, not a class"), (["a", "b"], "a row has one class")],
)  # fmt: skip
def test_what_is_no_class_is_refused(tmp_path, label, wrong):
    with pytest.raises(ValueError, match=wrong):
        labels.said(label)
    if label != label:  # no JSON; a column of numbers in Parquet has it where nothing stands
        return
    path = write(tmp_path / "rows.jsonl", [*ROWS, ("odd", label)])
    with pytest.raises(InputError, match=f"line 6  .*{wrong}"):
        loaded(path)
    assert len(loaded(path, on_bad_row="skip")[0]) == 5


def test_what_a_json_file_cannot_hold_is_no_class_either():
    for label, wrong in ((b"pos", "label is b'pos', bytes: a class is a name"), ("\ud800", r"the character U\+D800")):
        with pytest.raises(ValueError, match=wrong):
            labels.said(label)


def test_a_number_with_thousands_of_digits_is_a_name_as_any(tmp_path):
    """Python itself refuses to read it as a number, with words for its programmers."""
    rows = [("a", "9" * 5000), ("b", "1"), ("c", "-" + "9" * 5000)]
    assert loaded(write(tmp_path / "rows.jsonl", rows[:2]))[1] == ["1", "9" * 5000]
    with pytest.raises(InputError, match=r"line 3  label is -999.*which marks rows without a class"):
        loaded(write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match=r"label '999.* is not one of the classes of the training: neg, pos"):
        labels.number_of("9" * 5000, ("neg", "pos"))


def test_a_label_that_the_training_does_not_have_is_refused_with_its_file_and_line(tmp_path):
    train, other = write(tmp_path / "train.csv", ROWS), write(tmp_path / "test.csv", [("so so", "neg"), ("hm", "meh")])
    with pytest.raises(
        InputError, match=r"test\.csv(.|\n)*line 3  label 'meh' is not one of the classes of the training: neg, pos"
    ):
        loaded(train, eval_of=other)
    digits = write(tmp_path / "digits.csv", [("one", "1"), ("two", "2")])
    with pytest.raises(InputError, match="label '0' is not one of the classes"):  # 1 and 2 are names, not places
        loaded(digits, eval_of=write(tmp_path / "zero.csv", [("zero", "0")]))


def test_numbers_for_names_are_places_and_that_is_counted_and_said(tmp_path):
    train = write(tmp_path / "train.csv", ROWS)
    found, _ = loaded(train, eval_of=write(tmp_path / "test.csv", [("so so", "0"), ("hm", "pos"), ("oh", "1")]))
    assert found.numbers("label").tolist() == [0, 1, 1]
    summary = found.parts[0].summary
    assert summary["rows_by_place"] == 2
    assert altered(summary) == ["2 rows have a NUMBER FOR THEIR CLASS, its place in data.labels: 0 is the first"]
    assert loaded(train)[0].parts[0].summary["rows_by_place"] == 0


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [([("a", "x"), ("b", "x")], "every row has the label 'x'; there is nothing to tell apart"),
     ([("a", "Pos"), ("b", "pos"), ("c", "neg")], "'Pos', 'pos' differ in capitals, spaces or how a character is"),
     ([("a", "caf\u00e9"), ("b", "cafe\u0301"), ("c", "bar")], r"labels 'cafe\\u0301', 'caf\\xe9' differ in capitals"),
     ([("a", "pos"), ("b", "pos\u200b"), ("c", "neg")], r"labels 'pos', 'pos\\u200b' differ in"),
     ([("a", "\u00e4"), ("b", "\u00c4"), ("c", "neg")], "labels '\u00c4', '\u00e4' differ in"),
     ([("a", "1"), ("b", "1.0"), ("c", "2.0")], "'1', '1.0' are one number"),
     ([(str(n), f"answer {n}") for n in range(150)], "150 different labels in 150 rows, so these are not classes"),
     ([("a", None)], "no row has a label; the first row has text, label; it is looked for in 'label'")],
)  # fmt: skip
def test_labels_that_are_no_classes_are_refused(tmp_path, rows, wrong):
    with pytest.raises(InputError, match=wrong):
        loaded(write(tmp_path / "rows.jsonl", rows))


def test_columns_have_other_names_or_are_made_by_a_template(tmp_path):
    path = write(tmp_path / "rows.csv", ROWS, ("sentence", "stars"))
    with pytest.raises(
        InputError, match=r"no column 'label', 'text'; it has sentence, stars.*text: sentence, label: stars"
    ):
        loaded(path, labels=["neg", "pos"])
    found, _ = loaded(path, columns={"text": "sentence", "label": "stars"})
    assert len(found) == 5
    shouted, _ = loaded(path, columns={"text": "review: {{ sentence }}", "label": "stars"})
    assert shouted[1].input_ids == make_tokenizer()("review: a fine film").input_ids
    with pytest.raises(InputError, match=r"data\.columns\.prompt: rows with classes have text, text_pair, label"):
        loaded(path, columns={"prompt": "sentence", "label": "stars"})


def test_a_pair_is_told_apart_as_the_tokenizer_does(tmp_path):
    rows = [("film one", "is good", 1), ("film two", "is bad", 0)]
    found, _ = loaded(write(tmp_path / "pairs.jsonl", rows, ("text", "text_pair", "label")))
    expected = make_tokenizer()("film one", "is good")
    assert found[0].input_ids == expected.input_ids
    assert found[0].token_type_ids == expected.token_type_ids
    assert 0 < sum(expected.token_type_ids) < len(expected.token_type_ids)
    renamed = write(tmp_path / "other.jsonl", rows, ("a", "b", "label"))
    again, _ = loaded(renamed, columns={"text": "a", "text_pair": "b"})
    assert [*again] == [*found]
    assert found.parts[0].summary["rows_with_pairs"] == 2


def test_long_rows_are_refused_dropped_or_truncated(tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS, ("good " * 40, "pos")])
    with pytest.raises(InputError, match=r"line 6  42 tokens, data\.max_length is 16"):
        loaded(path, max_length=16)
    assert len(loaded(path, max_length=16, overlong="drop")[0]) == 5
    found, _ = loaded(path, max_length=16, overlong="truncate")
    expected = make_tokenizer()("good " * 40, truncation=True, max_length=16).input_ids
    assert found[5].input_ids == expected
    assert found.parts[0].summary["rows_truncated"] == 1


def test_the_balance_counts_classes_and_texts_with_two_labels(tmp_path):
    found, names = loaded(write(tmp_path / "rows.jsonl", [*ROWS, ("awful", "pos")]))
    balance = labels.balance(found, found[:2], names)
    assert balance["classes"] == [
        {"label": "neg", "rows": 3, "share": 0.5, "eval_rows": 0},
        {"label": "pos", "rows": 3, "share": 0.5, "eval_rows": 2},
    ]
    assert balance["contradictory"] == 3
    twice = found[np.repeat(np.arange(len(found)), 2)]  # as by a source's weight
    assert labels.balance(twice, found[:2], names)["contradictory"] == 3
    train, held_out = data.hold_out(found, 0.5, seed=0)
    assert np.intersect1d(train.keys, held_out.keys).size == 0  # one text is on one side, whatever its labels


def test_weights_of_classes_are_balanced_or_by_name():
    assert labels.weights(None, [1, 3], ["a", "b"]) is None
    balanced = labels.weights("balanced", [1, 3], ["a", "b"])
    assert balanced == pytest.approx((2.0, 2 / 3))
    assert np.dot(balanced, [1, 3]) == pytest.approx(4)  # a row counts 1 in the mean
    assert labels.weights({"a": 5}, [1, 3], ["a", "b"]) == (5.0, 1.0)
    with pytest.raises(InputError, match="no training row is b"):
        labels.weights("balanced", [4, 0], ["a", "b"])
    with pytest.raises(InputError, match="c is none of the classes a, b"):
        labels.weights({"c": 2}, [1, 3], ["a", "b"])
