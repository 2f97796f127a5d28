"""A row's format is read off its keys; a row of no format says what is wrong with it."""

import json
import re
import typing
from pathlib import Path

import pytest

from qlora.data import columns, formats, labels, preference
from qlora.data.image_files import IMAGE
from qlora.data.labelled import PAIR, TEXT
from qlora.recipe.sections import Column, Format
from tests.data.turns import ANSWER, USER, call, to_messages


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ANSWER], "id": 7}, ("messages", [USER, ANSWER])),
        ({"instruction": "Q", "input": "", "output": "A"}, ("alpaca", [USER, ANSWER])),
        ({"instruction": "Q", "output": "A"}, ("alpaca", [USER, ANSWER])),
        ({"prompt": "Q", "completion": "A"}, ("completion", [USER, ANSWER])),
        ({"prompt": [USER], "completion": [ANSWER]}, ("completion", [USER, ANSWER])),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            ("sharegpt", [USER, ANSWER]),
        ),
    ],
)
def test_each_shape_becomes_the_same_conversation(row, expected):
    assert to_messages(row) == expected


def test_alpaca_input_follows_the_instruction_and_system_comes_first():
    _, messages = to_messages({"instruction": "Sum up", "input": "text", "output": "A", "system": "S"})
    assert [message["content"] for message in messages] == ["S", "Sum up\n\ntext", "A"]


def test_alpaca_history_is_the_turns_before():
    row = {"instruction": "Q2", "output": "A2", "history": [["Q", "A"]], "system": "S"}
    _, messages = to_messages(row)
    assert [message["content"] for message in messages] == ["S", "Q", "A", "Q2", "A2"]
    assert messages[1:3] == [USER, ANSWER]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ANSWER], "images": ["x.png"]}, "images: not supported"),
        ({"text": "  "}, "text is empty"),
        ({"text": 5}, "text is 5, not a string"),
        ([], "not an empty list"),
        ({"words": "x"}, "keys words match no known format"),
        ({"messages": "hi"}, "messages is a string, but not a JSON list"),
        ({"instruction": "Q", "output": None}, "output is null"),
        ({"prompt": 1, "completion": "A"}, "strings or lists"),
    ],
)
def test_a_row_of_no_format_says_what_is_wrong_with_it(row, expected):
    with pytest.raises(ValueError, match=expected):
        formats.read(row)


def test_a_completion_knows_where_it_begins_and_text_is_no_conversation():
    assert formats.read({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})[1].completion == 3
    name, conversation = formats.read({"text": "Once", "id": 1})
    assert (name, conversation.messages, conversation.text) == ("text", [], "Once")


def test_a_format_that_the_recipe_does_not_expect_is_refused():
    with pytest.raises(ValueError, match="is of format completion, the recipe says format: alpaca"):
        formats.read({"prompt": "Q", "completion": "A"}, only="alpaca")


def test_labels_are_unused_and_what_is_empty_says_nothing():
    row = {"messages": [USER, {**ANSWER, "annotations": []}], "id": 0, "images": [], "note": None, "source": "web"}
    _, conversation = formats.read(row)
    assert conversation.unused == ("id", "source")
    assert conversation.messages == [USER, ANSWER]


def test_a_label_in_a_message_is_left_out_only_where_the_recipe_says_so():
    row = {"messages": [{**USER, "mood": "good"}, ANSWER], "images": ["x.png"]}
    _, conversation = formats.read(row, ignore=("mood", "images"))
    assert conversation.messages == [USER, ANSWER]
    assert conversation.unused == ("images", "mood")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ANSWER], "label": False}, "label: false.* KTO; supervised training does not take it"),
        ({"messages": [USER, ANSWER], "label": True}, "label: true.* KTO"),
        ({"prompt": "Q", "completion": "A", "label": "False"}, "label: false.* KTO"),
        ({"instruction": "Q", "output": "A", "kto_tag": False}, "kto_tag: false.* KTO"),
        ({"messages": [USER, ANSWER], "rejected": [ANSWER]}, "has rejected: .* DPO; supervised training does not"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "has chosen, rejected: .* DPO"),
    ],
)
def test_rows_that_say_do_not_learn_this_are_refused_by_the_name_of_their_objective(row, expected):
    with pytest.raises(ValueError, match=expected):
        formats.read(row)


def test_a_class_is_no_verdict_and_who_maps_the_good_answer_may_train_on_it():
    assert formats.read({"instruction": "Q", "output": "A", "label": 1})[1].unused == ("label",)
    assert formats.read({"text": "T", "label": False})[1].unused == ("label",)
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    _, conversation = columns.read(pair, {"prompt": "prompt", "completion": "chosen"})
    assert (conversation.messages, conversation.unused) == ([USER, ANSWER], ("rejected",))
    with pytest.raises(ValueError, match="KTO"):
        columns.read({"q": "Q", "a": "A", "label": False}, {"prompt": "q", "completion": "a"})


def test_a_null_that_arrow_may_have_filled_in_is_removed_and_counted_and_one_in_a_string_of_json_is_meant():
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}

    def row(arguments, **more):
        return {
            "messages": [
                {**USER, "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [call(arguments)]},
                {"role": "tool", "content": "2"},
                ANSWER,
            ],
            "tools": [{**tool, "parameters": {**tool["parameters"], "properties": {"x": {"type": "number"}, **more}}}],
        }

    plain, filled = (formats.read(one)[1] for one in (row({"x": 1}), row({"x": 1, "y": None}, y=None)))
    assert plain == filled
    assert (plain.nulls, filled.nulls) == (0, 2)
    meant = formats.read(row('{"x": 1, "y": null}'))[1]
    assert meant.messages[1]["tool_calls"] == [call({"x": 1, "y": None})]
    assert meant.nulls == 0


# ---- one list of formats -----------------------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_recipe_names_each_format_that_has_a_file_and_each_key_that_a_format_takes():
    files = {path.stem for path in Path(formats.__file__).parent.glob("[!_]*.py")}
    assert files == {*typing.get_args(Format)}
    taken = {key for known in formats.FORMATS.values() for key in known.USED}
    of_others = {TEXT, PAIR, IMAGE, labels.COLUMN, preference.CHOSEN, preference.REJECTED} - taken
    assert taken == {*typing.get_args(Column), "functions"} - of_others  # functions: the old name of tools


def test_the_document_shows_a_row_of_each_format():
    shown = re.findall(r'^    (\{".*\})$', DOCUMENT.partition("## What a row looks like")[2], re.MULTILINE)
    assert [formats.read(json.loads(row))[0] for row in shown] == [*formats.FORMATS]
    assert f"must have: {', '.join(formats.FORMATS)} |" in DOCUMENT
