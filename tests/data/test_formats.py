"""A row's shape is read off its keys; a row of no shape says what is wrong with it."""

import pytest

from qlora.data.formats import renamed, to_messages

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


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
        ({"instruction": "Q", "output": "A", "history": ["x"]}, "history is not a list"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "tools: not supported yet"),
        ([], "not an empty list"),
        ({"text": "x"}, "keys text fit no known shape"),
        ({"messages": []}, "an empty list"),
        ({"messages": "hi"}, "not a list"),
        ({"messages": [USER]}, "ends with the user"),
        ({"messages": [USER, {"role": "gpt", "content": "A"}]}, r"messages\[1\].role is 'gpt'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content is null"),
        ({"messages": [USER, {"role": "assistant"}]}, "content is null"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "content is 5"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "content is empty"),
        ({"messages": [USER, {**ANSWER, "tool_calls": []}]}, "tool_calls"),
        ({"messages": [USER, {"role": "system", "content": "S"}, ANSWER]}, "can only come first"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "surrogate"),
        ({"instruction": "Q", "output": None}, "output is null"),
        ({"conversations": [{"from": "observation", "value": "A"}]}, r"conversations\[0\].from is 'observation'"),
        ({"conversations": ["hi"]}, "not a list of"),
        ({"prompt": 1, "completion": "A"}, "strings or lists"),
    ],
)
def test_a_bad_row_says_what_is_wrong(row, expected):
    with pytest.raises(ValueError, match=expected):
        to_messages(row)


def test_columns_of_other_names_are_taken_by_name():
    columns = {"prompt": "question", "completion": "answer"}
    assert to_messages(renamed({"question": "Q", "answer": "A", "id": 1}, columns)) == ("completion", [USER, ANSWER])
    with pytest.raises(ValueError, match="has no column 'answer'; it has question"):
        renamed({"question": "Q"}, columns)
