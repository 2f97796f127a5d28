"""A message under the names of other projects is the same message; what is wrong with one is said with its place."""

import pytest

from qlora.data import formats
from tests.data.turns import ANSWER, USER, call, to_messages


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, {"role": "narrator", "content": "A"}]}, r"messages\[1\].role is 'narrator'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content is null"),
        ({"messages": [USER, {"role": "assistant"}]}, "content is null"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "content is 5"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "content is empty"),
        ({"messages": [USER, {**ANSWER, "mood": "good"}]}, r"has mood: unknown key.*data.ignore_keys: \[mood\]"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"function": {}}]}]}, r"tool_calls\[0\] is no"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "f()"}]}, "tool_calls is a string, not a list"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [call("{")]}]}, "arguments is not valid JSON"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [call("[1]")]}]}, "arguments is a list"),
        ({"messages": [{**USER, "tool_calls": [call("{}")]}, ANSWER]}, "only the assistant calls tools"),
        ({"messages": [USER, {**ANSWER, "train": 1}]}, "train is 1, not one of True, False"),
        ({"messages": [USER, {**ANSWER, "weight": 2}]}, "weight is 2, not 0 or 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "only text is supported"),
        ({"messages": [{"role": ["user"], "content": "Q"}, ANSWER]}, r"role is \['user'\]"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "surrogate"),
        ({"conversations": [{"from": "narrator", "value": "A"}]}, r"conversations\[0\].role is 'narrator'"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "is not a JSON function call"),
    ],
)
def test_a_bad_message_says_what_is_wrong_with_it(row, expected):
    with pytest.raises(ValueError, match=expected):
        formats.read(row)


def test_parts_of_text_are_joined_and_other_names_of_roles_understood():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    row = {"messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": parts}, ANSWER]}
    assert to_messages(row)[1] == [{"role": "system", "content": "S"}, {"role": "user", "content": "one\ntwo"}, ANSWER]


@pytest.mark.parametrize(
    "messages",
    [
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call('{"x": 1}')]},
            {"role": "tool", "content": "2"},
            ANSWER,
        ],
        [USER, {"role": "assistant", "tool_calls": [call({"x": 1})]}, {"role": "function", "content": "2"}, ANSWER],
        [
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "tool", "content": "2"},
            ANSWER,
        ],
    ],
)
def test_tool_calls_of_old_and_new_form_are_the_same(messages):
    expected = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call({"x": 1})]},
        {"role": "tool", "content": "2"},
        ANSWER,
    ]
    assert to_messages({"messages": messages})[1] == expected


def test_sharegpt_calls_and_observations_and_tools_as_a_string():
    turns = [
        ("human", "Q"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "2"),
        ("gpt", "A"),
    ]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns], "tools": '[{"name": "f"}]'}
    _, conversation = formats.read(row)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1]["tool_calls"] == [call({"x": 1})]
    assert conversation.tools == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
@pytest.mark.parametrize(("value", "trained"), [(0, False), (1, True), (0.0, False), (1.0, True)])
def test_weights_of_0_and_1_are_flags_however_they_are_written(key, value, trained):
    row = {"messages": [{**USER, key: 0.0}, {**ANSWER, key: value}]}
    assert formats.read(row)[1].flags == ((1, trained),)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"weight": 0.5}, "weight is 0.5, not 0 or 1"),
        ({"loss_weight": True}, "loss_weight is True, not 0 or 1"),
        ({"loss_weight": 0.0, "weight": 1}, "weight and loss_weight disagree"),
        ({"train": True, "weight": 0}, "train and weight disagree"),
    ],
)
def test_weights_between_or_against_each_other_are_refused(said, expected):
    with pytest.raises(ValueError, match=expected):
        formats.read({"messages": [USER, {**ANSWER, **said}]})


def test_names_and_parts_of_other_projects_mean_the_same():
    parts = [{"type": "text", "value": "one"}, {"type": "text", "text": "two"}]
    expected = [{"role": "user", "content": "one\ntwo"}, ANSWER]
    assert to_messages({"conversations": [{"role": "user", "content": parts}, ANSWER]})[1] == expected
    assert to_messages({"messages": [{"from": "human", "value": parts}, {"from": "gpt", "value": "A"}]})[1] == expected
    assert to_messages({"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'})[
        1
    ] == [
        USER,
        ANSWER,
    ]
    with pytest.raises(ValueError, match="has both content and value"):
        formats.read({"messages": [USER, {**ANSWER, "value": "B"}]})


def test_parts_of_reasoning_and_calls_are_the_keys_that_templates_read():
    parts = [
        {"type": "reasoning", "value": "Hm."},
        {"type": "text", "value": "Let me look."},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    row = {"messages": [USER, {"role": "assistant", "content": parts}, {"role": "tool", "content": "2"}, ANSWER]}
    assert to_messages(row)[1][1] == {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [call({"x": 1})],
        "reasoning_content": "Hm.",
    }
    for wrong in (parts[1:] + parts[:1], parts[2:] + parts[1:2]):
        with pytest.raises(ValueError, match="in this order"):
            formats.read({"messages": [USER, {"role": "assistant", "content": wrong}]})


def test_a_string_that_looks_like_messages_and_is_none_is_an_answer():
    row = {"prompt": '[{"role": ["user"], "content": "Q"}]', "completion": "A"}
    assert to_messages(row)[1] == [{"role": "user", "content": row["prompt"]}, ANSWER]
