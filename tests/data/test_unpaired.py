"""Unpaired answers: a row of supervised training and its verdict; pairs are two of them; prompts with other rows' answers."""

import numpy as np
import pytest

from qlora import data
from qlora.data.encoder import Settings, TooLong
from qlora.recipe import Data
from qlora.system.errors import InputError
from tests.conftest import write_jsonl

SAID = {"prompt": "What is 1 plus 2?", "completion": "1 plus 2 is 3."}
MESSAGES = [{"role": "user", "content": SAID["prompt"]}, {"role": "assistant", "content": SAID["completion"]}]


def encoder(tokenizer, columns=None, max_length=200, overlong="error"):
    return data.UnpairedPreferences(tokenizer, Settings("auto", columns, "assistant", max_length, overlong, "error"))


def only(found):
    [example] = found.examples
    return example


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (SAID, None),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, None),
        ({"messages": MESSAGES}, None),
        ({"instruction": SAID["prompt"], "output": SAID["completion"]}, None),
        ({"q": SAID["prompt"], "a": SAID["completion"], "n": 7}, {"prompt": "q", "completion": "a"}),
    ],
    ids=["strings", "messages in two", "messages", "alpaca", "columns"],
)
@pytest.mark.parametrize("good", [True, False, "true", "False", 1, "0", 1.0])
def test_every_shape_of_a_row_is_the_same_answer_and_its_verdict(tokenizer, row, columns, good):
    supervised = data.Supervised(tokenizer, Settings("auto", None, "assistant", 200, "error", "error"))
    expected = only(supervised.encode(SAID))
    found = only(encoder(tokenizer, columns).encode({**row, "label": good}))
    assert (found.input_ids, found.labels) == (expected.input_ids, expected.labels)
    assert found.good is (str(good).lower() in ("true", "1", "1.0"))


def test_a_label_may_have_another_name(tokenizer):
    found = encoder(tokenizer, {"prompt": "prompt", "completion": "completion", "label": "thumb"})
    assert only(found.encode({**SAID, "thumb": False, "label": "a topic"})).good is False
    assert only(encoder(tokenizer).encode({"messages": MESSAGES, "kto_tag": True})).good is True


def test_a_pair_is_a_good_and_a_bad_answer_under_one_key(tokenizer):
    found = encoder(tokenizer).encode({"prompt": SAID["prompt"], "chosen": "1 plus 2 is 3.", "rejected": "It is 9."})
    assert [one.good for one in found.examples] == [True, False]
    good, bad = found.examples
    assert good.input_ids == only(encoder(tokenizer).encode({**SAID, "label": True})).input_ids
    assert good.key != bad.key
    assert found.key == encoder(tokenizer).encode({**SAID, "label": True}).key  # held out with what has the same prompt


def test_the_label_is_of_the_last_answer(tokenizer):
    more = [*MESSAGES, {"role": "user", "content": "And 2 plus 2?"}, {"role": "assistant", "content": "5."}]
    found = only(encoder(tokenizer).encode({"messages": more, "label": False}))
    trained = [label for label in found.labels if label >= 0]
    assert "5." in tokenizer.decode(trained)
    assert "is 3" not in tokenizer.decode(trained)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": None}, "has no label, which says whether its answer is a good one: true or false; name its column"),
        ({"label": "maybe"}, "label is 'maybe', not true or false"),
        ({"label": "null"}, "label is 'null', not true or false"),
        ({"label": 2}, "label is 2, not true or false"),
        ({"label": 0.5}, "label is 0.5, not true or false"),
        ({"completion": ""}, "completion"),
        ({"prompt": None, "completion": None, "text": "Once upon a time"}, "plain text, which has no answer"),
    ],
)
def test_what_is_no_unpaired_answer_is_refused(tokenizer, change, reason):
    row = {key: value for key, value in {**SAID, "label": True, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=reason):
        encoder(tokenizer).encode(row)


def test_rows_of_the_other_kinds_say_which_training_takes_them(tokenizer):
    settings = Settings("auto", None, "assistant", 200, "error", "error")
    with pytest.raises(ValueError, match="with its label"):
        data.Preferences(tokenizer, settings).encode({**SAID, "label": True})
    with pytest.raises(ValueError, match=r"for KTO; supervised training does not take it"):
        data.Supervised(tokenizer, settings).encode({**SAID, "label": True})
    with pytest.raises(ValueError, match="leave kto out of the recipe for supervised training"):
        encoder(tokenizer).encode(SAID)


def test_an_answer_that_is_too_long_is_refused_or_cut(tokenizer):
    row = {**SAID, "label": True}
    whole = only(encoder(tokenizer).encode(row))
    limit = len(whole.input_ids) - 3
    with pytest.raises(TooLong):
        encoder(tokenizer, max_length=limit).encode(row)
    cut = encoder(tokenizer, max_length=limit, overlong="truncate").encode(row)
    assert only(cut).input_ids == whole.input_ids[:limit]
    assert cut.counts["rows_truncated"] == 1


def test_a_table_without_verdicts_is_refused(tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\nHi,Hello\n")
    section = Data(train=str(path))
    with pytest.raises(InputError, match=r"has no column 'label', which says whether an answer is good; it has prompt"):
        data.load(section.train, tokenizer, section, 0, data.UnpairedPreferences)


@pytest.fixture
def rows_of(tokenizer, tmp_path):
    def rows_of(rows):
        section = Data(train=str(write_jsonl(tmp_path / "rows.jsonl", rows)), max_length=200)
        return data.Rows(data.load(section.train, tokenizer, section, 0, data.UnpairedPreferences))

    return rows_of


ROWS = [
    {"prompt": "One?", "completion": "Yes, one.", "label": True},
    {"prompt": "One?", "completion": "No, two of them, and then some more.", "label": False},
    {"prompt": "Two?", "completion": "Two, since you ask so nicely.", "label": True},
    {"prompt": "Three, or is it four?", "completion": "Three.", "label": False},
    {"prompt": "Two?", "completion": "Two, since you ask so nicely.", "label": False},
]


def test_unpaired_rows_on_disk_are_what_they_were(tokenizer, rows_of):
    rows = rows_of(ROWS)
    expected = [only(encoder(tokenizer).encode(row)) for row in ROWS]
    assert list(rows) == expected
    assert rows.numbers("good").tolist() == [1, 0, 1, 0, 0]
    assert rows.numbers("pair", np.uint64).tolist() == [one.key for one in expected]
    told = data.unpaired.describe(rows, rows[:0], rows.parts)["judged"]
    assert (told["prompts"], told["desirable"], told["undesirable"], told["contradictory"]) == (3, 2, 3, 1)
    repeated = rows[np.repeat(np.arange(len(rows)), 2)]  # as by a source's weight
    twice = data.unpaired.describe(repeated, rows[:0], rows.parts)
    assert (twice["duplicates"], twice["judged"]["contradictory"], twice["judged"]["desirable"]) == (0, 1, 4)


def test_a_mismatched_row_is_a_prompt_with_the_answer_to_another(tokenizer, rows_of):
    rows = rows_of(ROWS)
    mismatched = data.Mismatched(rows)
    others = [2, 2, 3, 4, 0]  # the next row with another prompt
    longest = max(rows.lengths)
    for row, (found, other) in enumerate(zip(mismatched, others, strict=True)):
        expected = only(encoder(tokenizer).encode({**ROWS[row], "completion": ROWS[other]["completion"]}))
        assert (found.input_ids, found.labels) == (expected.input_ids[:longest], expected.labels[:longest])
    assert mismatched.lengths.tolist() == [len(one.input_ids) for one in mismatched]
    assert any(len(one.input_ids) == longest for one in mismatched)
    assert len(set(mismatched.numbers("pair").tolist())) == 4  # the first two are the same


def test_rows_of_one_prompt_are_mismatched_with_each_other(rows_of):
    rows = rows_of(ROWS[:2])
    assert data.Mismatched(rows)[0].input_ids == rows[1].input_ids


def test_where_one_answer_a_row_is_wanted_bad_ones_are_none(rows_of):
    rows = rows_of(ROWS)
    assert list(data.as_supervised(rows)) == [rows[0], rows[2]]
    pairs = rows_of([{"prompt": "One?", "chosen": "Yes.", "rejected": "No."}])
    assert list(data.as_supervised(pairs)) == [pairs[0]]
