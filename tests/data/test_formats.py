"""A row's shape is read off its keys; a row of no shape says what is wrong with it."""

import pytest

from qlora.data.formats import read, refuse_bad_columns, renamed, to_conversation
from qlora.system.errors import InputError

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
        ({"messages": [USER, ANSWER], "tools": [{"description": "f"}]}, r"tools\[0\] is not a function"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools is a string, but not valid JSON"),
        ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, "tools is an object, not a list"),
        ({"messages": [USER, ANSWER], "images": ["x.png"]}, "images: not supported"),
        ({"text": "  "}, "text is empty"),
        ({"text": 5}, "text is 5, not a string"),
        ([], "not an empty list"),
        ({"words": "x"}, "keys words match no known format"),
        ({"messages": []}, "an empty list"),
        ({"messages": "hi"}, "messages is a string, but not a JSON list"),
        ({"messages": [USER]}, "ends with the user"),
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
        ({"messages": [{**USER, "train": True}, ANSWER]}, "only the assistant's messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "only text is supported"),
        ({"messages": [{"role": ["user"], "content": "Q"}, ANSWER]}, r"role is \['user'\]"),
        ({"prompt": [], "completion": [USER, ANSWER]}, "must both have a message"),
        ({"messages": [USER, {"role": "system", "content": "S"}, ANSWER]}, "can only come first"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "surrogate"),
        ({"instruction": "Q", "output": None}, "output is null"),
        ({"conversations": [{"from": "narrator", "value": "A"}]}, r"conversations\[0\].role is 'narrator'"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "is not a JSON function call"),
        ({"conversations": ["hi"]}, r"conversations\[0\] is a string"),
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
    with pytest.raises(InputError, match=r"data.columns.prompt: .* is not a Jinja template"):
        refuse_bad_columns({"prompt": "{{ x"})


def test_a_label_that_is_a_number_is_an_answer():
    assert renamed({"q": "Q", "label": 1}, {"prompt": "q", "completion": "label"}) == {"prompt": "Q", "completion": "1"}


def test_columns_of_other_names_are_taken_by_name():
    columns = {"prompt": "question", "completion": "answer"}
    assert to_messages(renamed({"question": "Q", "answer": "A", "id": 1}, columns)) == ("completion", [USER, ANSWER])
    with pytest.raises(ValueError, match="has no column 'answer'; it has question"):
        renamed({"question": "Q"}, columns)


# ---- what a row says beside its shape --------------------------------------------------------------------------------


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
    _, conversation = to_conversation({**row, "system": "S", "history": [["Q", "A"]], "tools": tools})
    assert [message["content"] for message in conversation.messages] == ["S", "Q", "A", "Q2", "A2"]
    assert conversation.tools == [{"type": "function", "function": tools[0]}]
    assert conversation.unused == ()
    assert conversation.completion == (4 if "prompt" in row else None)


def test_system_beside_messages_comes_first_and_never_against_the_one_in_them():
    system = {"role": "system", "content": "S"}
    assert to_messages({"messages": [USER, ANSWER], "system": "S"})[1] == [system, USER, ANSWER]
    assert to_messages({"messages": [system, USER, ANSWER], "system": "S"})[1] == [system, USER, ANSWER]
    with pytest.raises(ValueError, match="system differs from the system message"):
        to_conversation({"messages": [system, USER, ANSWER], "system": "T"})
    with pytest.raises(ValueError, match=r"history: rows of format messages cannot hold it"):
        to_conversation({"messages": [USER, ANSWER], "history": [["Q", "A"]]})
    with pytest.raises(ValueError, match=r"system: rows of format text cannot hold it"):
        to_conversation({"text": "T", "system": "S"})


def test_labels_are_unused_and_what_is_empty_says_nothing():
    row = {"messages": [USER, {**ANSWER, "annotations": []}], "id": 0, "images": [], "note": None, "source": "web"}
    _, conversation = to_conversation(row)
    assert conversation.unused == ("id", "source")
    assert conversation.messages == [USER, ANSWER]


def test_a_label_in_a_message_is_left_out_only_where_the_recipe_says_so():
    row = {"messages": [{**USER, "mood": "good"}, ANSWER], "images": ["x.png"]}
    _, conversation = to_conversation(row, ignore=("mood", "images"))
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
        to_conversation(row)


def test_a_class_is_no_verdict_and_who_maps_the_good_answer_may_train_on_it():
    assert to_conversation({"instruction": "Q", "output": "A", "label": 1})[1].unused == ("label",)
    assert to_conversation({"text": "T", "label": False})[1].unused == ("label",)
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    _, conversation = read(pair, {"prompt": "prompt", "completion": "chosen"})
    assert (conversation.messages, conversation.unused) == ([USER, ANSWER], ("rejected",))
    with pytest.raises(ValueError, match="KTO"):
        read({"q": "Q", "a": "A", "label": False}, {"prompt": "q", "completion": "a"})


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
@pytest.mark.parametrize(("value", "trained"), [(0, False), (1, True), (0.0, False), (1.0, True)])
def test_weights_of_0_and_1_are_flags_however_they_are_written(key, value, trained):
    row = {"messages": [{**USER, key: 0.0}, {**ANSWER, key: value}]}
    assert to_conversation(row)[1].flags == ((1, trained),)


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
        to_conversation({"messages": [USER, {**ANSWER, **said}]})


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
    _, conversation = to_conversation({"conversations": [{"from": who, "value": what} for who, what in row]})
    g = {"type": "function", "function": {"name": "g", "arguments": {}}}
    turn = {"role": "assistant", "content": "Let me look.", "tool_calls": [call({"x": 1}), g]}
    assert conversation.messages == [USER, turn, {"role": "tool", "content": "2"}, ANSWER]
    assert conversation.merged


def test_flags_follow_their_message_when_others_are_merged_and_must_agree_in_one_turn():
    calls = {"role": "assistant", "tool_calls": [call({"x": 1})]}
    result = {"role": "tool", "content": "2"}
    row = [USER, {**ANSWER, "train": False}, {**calls, "train": False}, result, {**ANSWER, "train": True}]
    assert to_conversation({"messages": row})[1].flags == ((1, False), (3, True))
    with pytest.raises(ValueError, match=r"messages\[2\]: is one turn .* another train"):
        to_conversation({"messages": [USER, {**ANSWER, "train": False}, calls, result, ANSWER]})
    with pytest.raises(ValueError, match=r"messages\[2\]: two assistant messages in a row"):
        to_conversation({"messages": [USER, ANSWER, ANSWER]})
    with pytest.raises(ValueError, match="two assistant messages in a row"):
        to_conversation({"messages": [USER, calls, ANSWER]})
    with pytest.raises(ValueError, match="the prompt ends with the assistant"):
        to_conversation({"prompt": [USER, ANSWER], "completion": [calls]})


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
        to_conversation({"messages": [USER, {**ANSWER, "value": "B"}]})


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
            to_conversation({"messages": [USER, {"role": "assistant", "content": wrong}]})


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

    plain, filled = (to_conversation(one)[1] for one in (row({"x": 1}), row({"x": 1, "y": None}, y=None)))
    assert plain == filled
    assert (plain.nulls, filled.nulls) == (0, 2)
    meant = to_conversation(row('{"x": 1, "y": null}'))[1]
    assert meant.messages[1]["tool_calls"] == [call({"x": 1, "y": None})]
    assert meant.nulls == 0


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"prompt": "q", "completion": "a", "text": "t"},
            "data.columns.text: rows of format completion do not use text",
        ),
        ({"messages": "m", "history": "h"}, "rows of format messages do not use history"),
        ({"prompt": "q"}, "data.columns maps prompt: not enough for a row"),
    ],
)
def test_a_mapped_column_that_the_shape_cannot_use_is_an_error(columns, expected):
    with pytest.raises(InputError, match=expected):
        refuse_bad_columns(columns)


def test_a_mapped_column_that_some_rows_lack_is_optional_where_the_shape_says_so():
    columns = {"prompt": "q", "completion": "a", "system": "s"}
    assert [m["role"] for m in read({"q": "Q", "a": "A"}, columns)[1].messages] == ["user", "assistant"]
    assert read({"q": "Q", "a": "A", "s": "S"}, columns)[1].messages[0] == {"role": "system", "content": "S"}
