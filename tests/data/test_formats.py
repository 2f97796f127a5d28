"""A row's shape is read off its keys; a row of no shape says what is wrong with it."""

import pytest

from qlora.data.formats import refuse_bad_templates, renamed, to_conversation
from qlora.errors import InputError

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def to_messages(row):
    name, conversation = to_conversation(row)
    return name, conversation.messages


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


def call(arguments):
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Q", "output": "A", "history": ["x"]}, "history is not a list"),
        ({"messages": [USER, ANSWER], "tools": [{"description": "f"}]}, r"tools\[0\] is no function"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools is a string, but no JSON"),
        ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, "tools is an object, not a list"),
        ({"messages": [USER, ANSWER], "images": ["x.png"]}, "images: not supported"),
        ({"text": "  "}, "text is empty"),
        ({"text": 5}, "text is 5, not a string"),
        ([], "not an empty list"),
        ({"words": "x"}, "keys words fit no known shape"),
        ({"messages": []}, "an empty list"),
        ({"messages": "hi"}, "not a list"),
        ({"messages": [USER]}, "ends with the user"),
        ({"messages": [USER, {"role": "gpt", "content": "A"}]}, r"messages\[1\].role is 'gpt'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content is null"),
        ({"messages": [USER, {"role": "assistant"}]}, "content is null"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "content is 5"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "content is empty"),
        ({"messages": [USER, {**ANSWER, "mood": "good"}]}, "has mood: not understood"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"function": {}}]}]}, r"tool_calls\[0\] is no"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "f()"}]}, "tool_calls is a string, not a list"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [call("{")]}]}, "arguments is no JSON"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [call("[1]")]}]}, "arguments is a list"),
        ({"messages": [{**USER, "tool_calls": [call("{}")]}, ANSWER]}, "only the assistant calls tools"),
        ({"messages": [USER, {**ANSWER, "train": 1}]}, "train is 1, not one of True, False"),
        ({"messages": [USER, {**ANSWER, "weight": 2}]}, "weight is 2, not one of 1, 0|weight is 2, not one of 0, 1"),
        ({"messages": [{**USER, "train": True}, ANSWER]}, "only the assistant's messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "only text is supported"),
        ({"messages": [{"role": ["user"], "content": "Q"}, ANSWER]}, r"role is \['user'\]"),
        ({"prompt": [], "completion": [USER, ANSWER]}, "must both have a message"),
        ({"messages": [USER, {"role": "system", "content": "S"}, ANSWER]}, "can only come first"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "surrogate"),
        ({"instruction": "Q", "output": None}, "output is null"),
        ({"conversations": [{"from": "narrator", "value": "A"}]}, r"conversations\[0\].from is 'narrator'"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "is no JSON of a function call"),
        ({"conversations": ["hi"]}, "not a list of"),
        ({"prompt": 1, "completion": "A"}, "strings or lists"),
    ],
)
def test_a_bad_row_says_what_is_wrong(row, expected):
    with pytest.raises(ValueError, match=expected):
        to_conversation(row)


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
    _, conversation = to_conversation(row)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1]["tool_calls"] == [call({"x": 1})]
    assert conversation.tools == [{"type": "function", "function": {"name": "f"}}]


def test_what_a_row_says_of_training_a_message_is_kept_apart_from_the_message():
    row = {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "train": True}]}
    _, conversation = to_conversation(row)
    assert conversation.flags == ((1, False), (3, True))
    assert conversation.messages == [USER, ANSWER, USER, ANSWER]


def test_a_completion_knows_where_it_begins_and_text_is_no_conversation():
    assert to_conversation({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})[1].completion == 3
    name, conversation = to_conversation({"text": "Once", "id": 1})
    assert (name, conversation.messages, conversation.text) == ("text", [], "Once")


def test_rows_that_say_the_same_have_the_same_key():
    first, second, other = (
        to_conversation(row)[1].key()
        for row in (
            {"messages": [USER, ANSWER]},
            {"prompt": "Q", "completion": "A"},
            {"prompt": "Q", "completion": "B"},
        )
    )
    assert first == second != other


def test_a_format_that_the_recipe_does_not_expect_is_refused():
    with pytest.raises(ValueError, match="is of format completion, the recipe says format: alpaca"):
        to_conversation({"prompt": "Q", "completion": "A"}, only="alpaca")


def test_columns_may_be_jinja_templates_of_the_rows_columns():
    columns = {
        "prompt": "{{ question }}\n{% for c in choices %}{{ loop.index }}. {{ c }}\n{% endfor %}",
        "completion": "{{ choices[answer] }}",
    }
    row = renamed({"question": "Which?", "choices": ["a", "b"], "answer": 1}, columns)
    assert row == {"prompt": "Which?\n1. a\n2. b\n", "completion": "b"}
    with pytest.raises(ValueError, match=r"data.columns fails: .*Undefined"):
        renamed({"question": "Which?", "choices": ["a", "b"]}, columns)
    with pytest.raises(ValueError, match=r"data.columns fails: .*NoneType"):
        renamed({"x": None}, {"prompt": "{{ x | dictsort }}"})
    with pytest.raises(ValueError, match=r"fails: .*(unsafe|access)"):
        renamed({"x": "a"}, {"prompt": "{{ x.__class__.__mro__ }}"})
    with pytest.raises(InputError, match=r"data.columns.prompt: .* is no Jinja template"):
        refuse_bad_templates({"prompt": "{{ x"})


def test_a_label_that_is_a_number_is_an_answer():
    assert renamed({"q": "Q", "label": 1}, {"prompt": "q", "completion": "label"}) == {"prompt": "Q", "completion": "1"}


def test_columns_of_other_names_are_taken_by_name():
    columns = {"prompt": "question", "completion": "answer"}
    assert to_messages(renamed({"question": "Q", "answer": "A", "id": 1}, columns)) == ("completion", [USER, ANSWER])
    with pytest.raises(ValueError, match="has no column 'answer'; it has question"):
        renamed({"question": "Q"}, columns)
