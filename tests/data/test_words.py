"""No word of a row is lost without an error, whatever a template does; what weighs less is counted."""

import copy

import pytest

from qlora.data.conversation import Conversation
from qlora.data.masked_examples import encode, encode_prompt
from qlora.data.words import left_out
from tests.conftest import CHATML, make_tokenizer, some_slow
from tests.data.test_matrix import (
    _ASKED,
    _CALL,
    _TOLD,
    _TOOLS,
    IN_CI,
    SHAPES,
    _turn,
    outcome,
    templates,
    tokenizer_of,
)

# short words, each of which stands in another message too
SHORT = [_turn("user", "5"), _turn("assistant", "5"), _turn("user", "55"), _turn("assistant", "555")]
CONVERSATIONS = {
    "short": (SHORT, None),
    "system": ([_turn("system", "5"), *SHORT], None),
    "result": (_TOLD, _TOOLS),
    "result, no tools": (_TOLD, None),
    "result, no call": ([*_TOLD[:1], _turn("assistant", "Ask."), *_TOLD[2:]], None),
}


def with_messages(name, changed):
    """Return a tokenizer whose template is that of `name` for messages that the Jinja expression `changed` has changed."""
    tokenizer = copy.deepcopy(tokenizer_of(name))
    # but not in the conversations by which templates are found out about: these ask Q
    change = f"{{%- if 'Q' not in messages[0]['content'] | string -%}}{{%- set messages = {changed} -%}}{{%- endif -%}}"
    tokenizer.chat_template = change + tokenizer.chat_template
    return tokenizer


CALLS = [name for name in templates() if outcome(name, "call") in ("right", "split")]


@pytest.mark.parametrize("name", some_slow(templates(), but=IN_CI))
def test_a_template_that_leaves_any_message_out_is_refused(name):
    """Each message in turn is taken from a template that shows it."""
    tried = 0
    for messages, tools in CONVERSATIONS.values():
        try:
            encode(tokenizer_of(name), Conversation(messages, tools), "last_assistant")
        except ValueError:
            continue
        for index in range(len(messages)):
            tokenizer = with_messages(name, f"messages[:{index}] + messages[{index + 1}:]")
            for train_on in ("assistant", "last_assistant"):
                with pytest.raises(ValueError, match="the chat template"):
                    encode(tokenizer, Conversation(messages, tools), train_on)
            tried += 1
    assert tried >= len(SHORT)


@pytest.mark.parametrize("name", some_slow(CALLS, but={*CALLS} & {*IN_CI}))
@pytest.mark.parametrize("lost", ["Paris", "31.5", "7", "city", "null"])
def test_a_part_of_a_call_that_a_template_leaves_out_is_missed(name, lost):
    """The answer that follows says it too, so that it stands in the text all the same."""
    arguments = {"city": "Paris", "warmth": 31.5, "days": [7, {"deep": None}]}
    call = {**_CALL, "function": {"name": "get_weather", "arguments": arguments}}
    messages = [_ASKED[0], _turn("assistant", "", tool_calls=[call]), *_TOLD[2:]]
    encode(tokenizer_of(name), Conversation(messages, _TOOLS))
    less = {
        "Paris": "'city': '', 'warmth': 31.5, 'days': [7, {'deep': none}]",
        "31.5": "'city': 'Paris', 'days': [7, {'deep': none}], 'warmth': 3",
        "7": "'city': 'Paris', 'warmth': 31.5, 'days': [{'deep': none}]",
        "city": "'where': 'Paris', 'warmth': 31.5, 'days': [7, {'deep': none}]",
        "null": "'city': 'Paris', 'warmth': 31.5, 'days': [7, {'deep': 1}]",
    }[lost]
    call = f"{{'type': 'function', 'function': {{'name': 'get_weather', 'arguments': {{{less}}}}}}}"
    message = f"{{'role': 'assistant', 'content': '', 'tool_calls': [{call}]}}"
    tokenizer = with_messages(name, f"messages[:1] + [{message}][:messages[1:] | length] + messages[2:]")
    with pytest.raises(
        ValueError,
        match=r"leaves the call of 'get_weather' out, or a part of it|"
        r"does not continue the prompt that chat shows with message 1",
    ):
        encode(tokenizer, Conversation(messages, _TOOLS))


def test_tools_that_only_the_call_names_are_missed(tokenizer_json):
    template = CHATML.replace(
        "{{ message['content'] }}", "{{ message['content'] }}{{ message['tool_calls'] | string }}"
    )
    conversation = Conversation([_turn("user", "Do get_weather."), _ASKED[1]], _TOOLS)
    with pytest.raises(ValueError, match=r"leaves the row's tools out \('get_weather'\)"):
        encode(make_tokenizer(tokenizer_json, template), conversation)
    with pytest.raises(ValueError, match=r"leaves the row's tools out \('get_weather'\)"):
        encode_prompt(make_tokenizer(tokenizer_json, template), conversation.messages[:1], _TOOLS)


def test_a_result_is_missed_where_nothing_else_of_the_row_is_about_tools(tokenizer_json):
    template = "{% for message in messages if message['role'] != 'tool' %}" + CHATML.partition("%}")[2]
    conversation = Conversation([_turn("user", "How warm?"), _turn("assistant", "I look."), *_TOLD[2:]])
    with pytest.raises(ValueError, match="leaves a tool's result out"):
        encode(make_tokenizer(tokenizer_json, template), conversation)


@pytest.mark.parametrize("content", ["One\ntwo", 'say "no"', "é\\n", '{"a": [1.5, "x"], "b": true}'])
def test_a_result_that_is_written_as_json_is_there(content):
    """Llama 3.1 writes the string as JSON: in quotes, with escapes."""
    messages = [*_ASKED, _turn("tool", content), _turn("assistant", "So.")]
    (example,) = encode(tokenizer_of("llama3_1"), Conversation(messages, _TOOLS))
    assert example.num_trained


def test_what_describes_a_tool_or_a_message_and_is_not_shown_is_counted():
    tool = {
        "type": "function",
        "function": {"name": "f", "description": "Adds.", "parameters": {"properties": {"x": {}}}},
    }
    messages = [_turn("user", "Q", name="Ann"), _turn("tool", "1", tool_call_id="c7"), _turn("assistant", "A")]
    assert left_out("Q 1 A f", messages, [tool]) == {"name", "tool_call_id", "tools.description", "tools.properties"}
    assert left_out("Ann: Q c7 1 A f Adds. x", messages, [tool]) == set()


def test_the_two_spellings_of_a_thought_say_the_same():
    compared = 0
    for name in templates():
        if outcome(name, "thoughts") == outcome(name, "inline thoughts") == "right":
            found = [
                encode(tokenizer_of(name), Conversation(*SHAPES[shape])) for shape in ("thoughts", "inline thoughts")
            ]
            texts = ["".join(tokenizer_of(name).decode(rows[0].input_ids).split()) for rows in found]
            if "<think>" in texts[0]:
                assert texts[0] == texts[1]
                compared += 1
    assert compared > 10
