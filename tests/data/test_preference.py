"""Rows of pairs of every known shape become two sequences that begin alike; what is no pair is refused with its reason."""

import json

import numpy as np
import pytest

from qlora import data
from qlora.data import preference
from qlora.data.encoder import Settings, TooLong
from qlora.recipe import Data
from qlora.system.errors import InputError
from tests.conftest import write_jsonl

ASKED = {"role": "user", "content": "What is 1 plus 2?"}
GOOD, BAD = {"role": "assistant", "content": "3."}, {"role": "assistant", "content": "It is 4."}
PAIR = {"prompt": ASKED["content"], "chosen": GOOD["content"], "rejected": BAD["content"]}


def settings(**changed):
    names = {"format": "auto", "columns": None, "train_on": "assistant", "max_length": 200, "overlong": "error"}
    return Settings(**{**names, "on_bad_row": "error", **changed})


def encoder(tokenizer, **changed):
    return data.Preferences(tokenizer, settings(**changed))


def one(tokenizer, row, **changed):
    (pair,) = encoder(tokenizer, **changed).encode(row).examples
    return pair


HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: What is 1 plus 2?\n\nAssistant: "
SHAPES = {
    "strings": PAIR,
    "messages": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "JSON in a cell": {"prompt": json.dumps([ASKED]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    "implicit prompt": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "both": {"prompt": ASKED["content"], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": ASKED["content"]}],
        "chosen": {"from": "gpt", "value": "3."},
        "rejected": {"from": "gpt", "value": "It is 4."},
    },
    "openai": {"messages": [ASKED], "chosen": GOOD, "rejected": BAD},
    "alpaca": {"instruction": ASKED["content"], "input": "", "chosen": "3.", "rejected": "It is 4."},
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_a_row_is_the_same_pair(tokenizer, name):
    pair = one(tokenizer, SHAPES[name])
    expected = one(tokenizer, PAIR)
    assert pair == expected
    assert pair.key == expected.key
    for example, text in ((pair.chosen, "3."), (pair.rejected, "It is 4.")):
        assert tokenizer.decode([i for i in example.labels if i >= 0]) == text + "<|im_end|>"
        assert tokenizer.decode(example.input_ids).startswith("<|im_start|>user\nWhat is 1 plus 2?<|im_end|>\n")


def test_a_dialogue_as_of_hh_trains_its_last_answer_alone(tokenizer):
    pair = one(tokenizer, {"chosen": HH + "3.", "rejected": HH + "It is 4."})
    assert tokenizer.decode([i for i in pair.chosen.labels if i >= 0]) == "3.<|im_end|>"
    assert "Hello!" in tokenizer.decode(pair.chosen.input_ids)


def test_columns_and_a_system_message(tokenizer):
    row = {"question": PAIR["prompt"], "good": "3.", "bad": "It is 4.", "system": "Count.", "id": 7}
    mapped = {"prompt": "question", "chosen": "good", "rejected": "bad", "system": "system"}
    encoded = encoder(tokenizer, columns=mapped).encode(row)
    assert set(encoded.unused) == {"id"}
    assert tokenizer.decode(encoded.examples[0].rejected.input_ids).startswith("<|im_start|>system\nCount.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": "3."}, "chosen and rejected are the same answer"),
        ({"rejected": " "}, "rejected is empty"),
        ({"chosen": ""}, "chosen is empty"),
        ({"label": True}, "has label: true beside chosen and rejected, which say themselves which answer is better"),
        ({"chosen": 3}, "chosen is 3, not a string"),
        ({"prompt": None}, "chosen is a string, and there is no prompt"),
        ({"prompt": 7}, "prompt is 7, not a string or a list"),
        ({"chosen": [ASKED, GOOD]}, "one of chosen and rejected is a whole conversation"),
        ({"prompt": "Else", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "prompt says something else"),
        (
            {"prompt": None, "chosen": [ASKED, GOOD, ASKED], "rejected": [ASKED, BAD, ASKED]},
            "chosen ends with a message of the user",
        ),
        (
            {"prompt": None, "chosen": [ASKED, GOOD], "rejected": [{**ASKED, "content": "x"}, BAD]},
            "differ in message 0",
        ),
        ({"images": ["a.png"]}, "images: not supported"),
    ],
)
def test_what_is_no_pair_is_refused(tokenizer, change, reason):
    row = {key: value for key, value in {**PAIR, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=reason):
        encoder(tokenizer).encode(row)


def test_rows_without_two_answers_are_refused(tokenizer):
    with pytest.raises(ValueError, match="neither chosen nor rejected, only messages: a row for supervised training"):
        encoder(tokenizer).encode({"messages": [ASKED, GOOD]})
    with pytest.raises(ValueError, match=r"only messages, label: one answer with its label \(KTO\), which is no pair"):
        encoder(tokenizer).encode({"messages": [ASKED, GOOD], "label": False})
    with pytest.raises(ValueError, match="has no rejected; a pair has both"):
        encoder(tokenizer).encode({"prompt": "x", "chosen": "y"})
    with pytest.raises(ValueError, match="a row is an object with chosen and rejected, not"):
        encoder(tokenizer).encode([1])


def test_what_is_too_long(tokenizer):
    row = {**PAIR, "rejected": "4 " * 40}
    long = len(one(tokenizer, row).rejected.input_ids)
    with pytest.raises(TooLong, match=f"{long} tokens, data.max_length is {long - 5}"):
        one(tokenizer, row, max_length=long - 5)
    cut = one(tokenizer, row, max_length=long - 5, overlong="truncate")
    assert len(cut.rejected.input_ids) == long - 5
    assert cut.chosen == one(tokenizer, PAIR).chosen


def test_scores_of_a_row_say_ties_and_pairs_the_wrong_way_round(tokenizer):
    for scores, counted in (((1, 1), "pairs_tied"), ((1, 2.5), "pairs_reversed"), ((3, 1), None)):
        counts = encoder(tokenizer).encode({**PAIR, "score_chosen": scores[0], "score_rejected": scores[1]}).counts
        assert [key for key in ("pairs_tied", "pairs_reversed") if counts[key]] == [counted] * (counted is not None)
    assert preference.read({**PAIR, "score_chosen": 10**400, "score_rejected": 1})[1].better is None


@pytest.fixture
def rows_of(tokenizer, tmp_path):
    def rows_of(rows, **section):
        section = Data.of_file(write_jsonl(tmp_path / "pairs.jsonl", rows), {"max_length": 200, **section})
        parts = data.load(section.train, tokenizer, section, 0, data.Preferences)
        return data.Rows(parts), parts

    return rows_of


def test_pairs_on_disk_are_what_they_were(tokenizer, rows_of):
    rows, parts = rows_of([PAIR, PAIR, {**PAIR, "rejected": "5"}, {**PAIR, "prompt": "And 2 plus 1?"}])
    pair = one(tokenizer, PAIR)
    assert rows[0] == pair
    assert rows[0].key == pair.key == rows[1].key != rows[2].key
    assert rows.are_pairs
    assert rows.lengths[0] == len(pair.input_ids)
    assert rows.longest[0] == len(pair.rejected.input_ids) > len(pair.chosen.input_ids)
    assert rows.num_trained[0] == pair.num_trained
    assert tokenizer.decode([rows.last_trained[0]]) == "<|im_end|>"
    found = preference.describe(rows[:3], rows[3:], parts)
    assert found["duplicates"] == 1
    assert found["eval_rows_in_training"] == 0
    assert preference.describe(rows[:3], rows[1:2], parts)["eval_rows_in_training"] == 1
    assert found["preference"]["prompts"] == 1
    assert found["preference"]["chosen_longer"] == pytest.approx(1 / 3)
    assert [c.messages[-1]["content"] for c in data.conversations(rows)] == ["3."] * 4
    answers = data.Answers(rows, 1)
    assert answers[:2][1] == pair.rejected
    assert len(answers) == 4


def test_rows_that_prefer_the_other_answer_of_the_same_two_contradict_each_other(rows_of):
    third = {**PAIR, "chosen": PAIR["rejected"], "rejected": "Do not ask me."}  # 3. > It is 4. > Do not ask me.
    swapped = {**PAIR, "chosen": [BAD], "rejected": [GOOD]}
    rows, parts = rows_of([PAIR, PAIR, third, {**swapped, "prompt": "And 2 plus 1?"}, swapped])

    def contradictory(some):
        return preference.describe(some, rows[:0], parts)["preference"]["contradictory"]

    assert contradictory(rows[:4]) == 0
    assert contradictory(rows) == 3
    assert preference.describe(rows, rows[:0], parts)["duplicates"] == 1
    twice = rows[np.repeat(np.arange(len(rows)), 2)]  # as by a source's weight
    assert contradictory(twice) == 3
    assert preference.describe(twice, rows[:0], parts)["duplicates"] == 1


def test_pairs_of_one_prompt_are_held_out_together(rows_of):
    rows, _ = rows_of([{**PAIR, "prompt": f"Count to {n // 4}", "rejected": f"no {n}"} for n in range(24)])
    trained, held = data.hold_out(rows, 0.5, seed=1)
    assert len(held) == 12
    assert not np.isin(held.keys, trained.keys).any()


def test_bad_pairs_are_counted_where_the_recipe_skips_them(rows_of):
    with pytest.raises(
        InputError, match=r"pairs.jsonl has 1 problem\n  line 2  chosen and rejected are the same answer"
    ):
        rows_of([PAIR, {**PAIR, "rejected": "3."}])
    rows, parts = rows_of([PAIR, {**PAIR, "rejected": "3."}], on_bad_row="skip")
    assert len(rows) == 1
    assert parts[0].summary["rows_dropped"] == 1


def test_a_table_without_answers_is_refused(tokenizer, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("prompt,chosen\na,b\n")
    section = Data.of_file(file, {})
    with pytest.raises(InputError, match=r"has no column 'rejected'; it has prompt, chosen. Name those that hold"):
        data.load(section.train, tokenizer, section, 0, data.Preferences)
    section = Data.of_file(file, {"columns": {"completion": "prompt"}})
    with pytest.raises(InputError, match=r"data.columns.completion: preference pairs have prompt"):
        data.load(section.train, tokenizer, section, 0, data.Preferences)


def test_an_answer_that_would_merge_with_the_prompt_leaves_the_prompt_alone(tokenizer):
    """A prompt that ends with a space, before "46" and "$46": one tokenization of both would give the two other prompts."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST] {% else %}{{ m['content'] }}"
        "<|im_end|>{% endif %}{% endfor %}"
    )
    pair = one(tokenizer, {"prompt": "How is it?", "chosen": " is 46", "rejected": "$46"})
    begins = [next(at for at, i in enumerate(e.labels) if i >= 0) for e in (pair.chosen, pair.rejected)]
    assert pair.chosen.input_ids[: begins[0]] == pair.rejected.input_ids[: begins[1]]
    assert tokenizer.decode(pair.chosen.input_ids[: begins[0]]) == "[INST] How is it? [/INST] "
    assert tokenizer.decode([i for i in pair.rejected.labels if i >= 0]) == "$46<|im_end|>"


def test_what_is_wrong_with_an_answer_is_said_by_its_name(tokenizer):
    for row, message in (
        ({**PAIR, "rejected": {"role": "assistant", "content": ""}}, r"rejected\[0\].content is empty"),
        ({**PAIR, "chosen": [GOOD, BAD]}, r"chosen\[1\]: two assistant messages in a row"),
        ({**PAIR, "prompt": [{"role": "user", "content": ""}]}, r"prompt\[0\].content is empty"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "has no prompt: give prompt, messages, conversations or instruction"),
    ):
        with pytest.raises(ValueError, match=message):
            one(tokenizer, row)


def test_answers_that_are_the_same_once_they_are_cut_are_left_out(tokenizer):
    row = {**PAIR, "chosen": "a" * 300, "rejected": "a" * 300 + "b"}
    with pytest.raises(TooLong, match=r"the same up to data\.max_length 100"):
        one(tokenizer, row, max_length=100, overlong="truncate")


def test_pairs_of_the_same_words_of_which_other_answers_are_trained_have_other_keys(tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    found = {"role": "tool", "content": "3", "name": "add"}
    said = [
        {"prompt": [ASKED], "chosen": [call, found, GOOD], "rejected": [call, found, BAD]},
        {"prompt": [ASKED, call, found], "chosen": [GOOD], "rejected": [BAD]},
    ]
    keys = {preference.read(row)[1].pair_key() for row in said}
    assert len(keys) == 2
