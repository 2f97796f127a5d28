"""Which messages may follow which, and what stands beside them in a row."""

import pytest

from qlora.data import formats
from tests.data.turns import ANSWER, USER, call, to_messages


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Q", "output": "A", "history": ["x"]}, "history is not a list"),
        ({"messages": [USER, ANSWER], "tools": [{"description": "f"}]}, r"tools\[0\] is not a function"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools is a string, but not valid JSON"),
        ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, "tools is an object, not a list"),
        ({"messages": []}, "an empty list"),
        ({"messages": [USER]}, "ends with the user"),
        ({"messages": [{**USER, "train": True}, ANSWER]}, r"messages\[0\]\.train: only the assistant's messages"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, r"messages\[0\]\.weight: only the assistant's messages"),
        ({"prompt": [], "completion": [USER, ANSWER]}, "must both have a message"),
        ({"messages": [USER, {"role": "system", "content": "S"}, ANSWER]}, "can only come first"),
        ({"conversations": ["hi"]}, r"conversations\[0\] is a string"),
    ],
)
def test_messages_that_are_no_conversation_say_what_is_wrong(row, expected):
    with pytest.raises(ValueError, match=expected):
        formats.read(row)


def test_what_a_row_says_of_training_a_message_is_kept_apart_from_the_message():
    row = {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "train": True}]}
    _, conversation = formats.read(row)
    assert conversation.flags == ((1, False), (3, True))
    assert conversation.messages == [USER, ANSWER, USER, ANSWER]


def test_rows_that_say_the_same_have_the_same_key():
    first, second, other = (
        formats.read(row)[1].key()
        for row in (
            {"messages": [USER, ANSWER]},
            {"prompt": "Q", "completion": "A"},
            {"prompt": "Q", "completion": "B"},
        )
    )
    assert first == second != other


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q2", "completion": "A2"},
        {"instruction": "Q2", "output": "A2"},
        {"prompt": [{"role": "user", "content": "Q2"}], "completion": [{"role": "assistant", "content": "A2"}]},
    ],
)
def test_system_history_and_tools_go_into_the_conversation_of_every_shape_that_has_one(row):
    tools = [{"name": "f", "parameters": {}}]
    _, conversation = formats.read({**row, "system": "S", "history": [["Q", "A"]], "tools": tools})
    assert [message["content"] for message in conversation.messages] == ["S", "Q", "A", "Q2", "A2"]
    assert conversation.tools == [{"type": "function", "function": tools[0]}]
    assert conversation.unused == ()
    assert conversation.completion == (4 if "prompt" in row else None)


def test_system_beside_messages_comes_first_and_never_against_the_one_in_them():
    system = {"role": "system", "content": "S"}
    assert to_messages({"messages": [USER, ANSWER], "system": "S"})[1] == [system, USER, ANSWER]
    assert to_messages({"messages": [system, USER, ANSWER], "system": "S"})[1] == [system, USER, ANSWER]
    with pytest.raises(ValueError, match="system differs from the system message"):
        formats.read({"messages": [system, USER, ANSWER], "system": "T"})
    with pytest.raises(ValueError, match=r"history: rows of format messages cannot hold it"):
        formats.read({"messages": [USER, ANSWER], "history": [["Q", "A"]]})
    with pytest.raises(ValueError, match=r"system: rows of format text cannot hold it"):
        formats.read({"text": "T", "system": "S"})


@pytest.mark.parametrize(
    "turns",
    [
        [
            ("gpt", "Let me look."),
            ("function_call", '[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]'),
        ],
        [
            ("gpt", "Let me look."),
            ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
            ("function_call", '{"name": "g", "arguments": {}}'),
        ],
    ],
)
def test_words_and_calls_in_several_messages_are_the_one_turn_of_chat(turns):
    row = [("human", "Q"), *turns, ("observation", "2"), ("gpt", "A")]
    _, conversation = formats.read({"conversations": [{"from": who, "value": what} for who, what in row]})
    g = {"type": "function", "function": {"name": "g", "arguments": {}}}
    turn = {"role": "assistant", "content": "Let me look.", "tool_calls": [call({"x": 1}), g]}
    assert conversation.messages == [USER, turn, {"role": "tool", "content": "2"}, ANSWER]
    assert conversation.merged


def test_flags_follow_their_message_when_others_are_merged_and_must_agree_in_one_turn():
    calls = {"role": "assistant", "tool_calls": [call({"x": 1})]}
    result = {"role": "tool", "content": "2"}
    row = [USER, {**ANSWER, "train": False}, {**calls, "train": False}, result, {**ANSWER, "train": True}]
    assert formats.read({"messages": row})[1].flags == ((1, False), (3, True))
    with pytest.raises(ValueError, match=r"messages\[2\]: is one turn .* another train;"):
        formats.read({"messages": [USER, {**ANSWER, "train": False}, calls, result, ANSWER]})
    with pytest.raises(ValueError, match=r"messages\[2\]: is one turn .* another loss_weight;"):
        formats.read({"messages": [USER, {**ANSWER, "loss_weight": 0}, calls, result, ANSWER]})
    with pytest.raises(ValueError, match=r"messages\[2\]: two assistant messages in a row"):
        formats.read({"messages": [USER, ANSWER, ANSWER]})
    with pytest.raises(ValueError, match="two assistant messages in a row"):
        formats.read({"messages": [USER, calls, ANSWER]})
    with pytest.raises(ValueError, match="the prompt ends with the assistant"):
        formats.read({"prompt": [USER, ANSWER], "completion": [calls]})
