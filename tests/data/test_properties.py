"""Random rows: a bad one is a ValueError and nothing else; in a good one only the answers are trained."""

import contextlib
import importlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import some_slow
from tests.data import oracle
from tests.data.families import BY_NAME
from tests.data.test_templates import as_messages, as_sharegpt, check, encode, tokenizer_of

SMALL = settings(max_examples=100, derandomize=True, deadline=None, database=None)
# families whose control tokens all are special ones and take no whitespace along
NAMES = ["llama-3.1", "qwen2.5", "gemma-3", "smollm2", "mistral-style"]

CONTROL = sorted({token for name in NAMES for token in BY_NAME[name].special})
any_text = st.one_of(st.text(max_size=12), st.sampled_from([*CONTROL, "", " ", "\n", "\ud800", "user", "assistant"]))
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), any_text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(any_text, inner, max_size=3)),
    max_leaves=8,
)
roles = st.sampled_from(["system", "user", "assistant", "tool", "developer", "human", "gpt", "function_call", "", None])
tool_calls = st.lists(
    st.one_of(
        junk,
        st.fixed_dictionaries(
            {"function": st.one_of(junk, st.fixed_dictionaries({"name": junk, "arguments": junk}))},
            optional={"id": junk, "type": junk},
        ),
    ),
    max_size=2,
)
message = st.one_of(
    junk,
    st.fixed_dictionaries(
        {"role": roles, "content": st.one_of(any_text, junk)},
        optional={"tool_calls": st.one_of(tool_calls, junk), "train": junk, "weight": junk, "name": junk},
    ),
    st.fixed_dictionaries({"from": roles, "value": st.one_of(any_text, junk)}, optional={"weight": junk}),
)

messages = st.one_of(st.lists(message, max_size=4), junk)
FIELDS = {
    "messages": messages,
    "conversations": messages,
    "prompt": messages,
    "completion": messages,
    "tools": st.one_of(junk, st.lists(st.dictionaries(st.sampled_from(["type", "function"]), junk), max_size=2)),
    "history": st.one_of(junk, st.lists(st.lists(any_text, max_size=3), max_size=2)),
    **dict.fromkeys(("instruction", "input", "output", "system", "text", "images", "id"), junk),
}
rows = st.one_of(
    junk,
    *(
        st.fixed_dictionaries(
            {key: FIELDS[key] for key in shape},
            optional={key: field for key, field in FIELDS.items() if key not in shape},
        )
        for shape in (["messages"], ["conversations"], ["prompt", "completion"], ["instruction", "output"])
    ),
)


@SMALL
@given(row=rows)
def test_a_row_of_any_kind_is_taken_or_is_a_value_error(row):
    formats = importlib.import_module("qlora.data.formats")
    with contextlib.suppress(ValueError):
        formats.read(row)


@SMALL
@given(row=rows.filter(lambda row: isinstance(row, dict)), part=junk)
def test_a_good_row_with_one_bad_part_is_taken_or_is_a_value_error(row, part):
    formats = importlib.import_module("qlora.data.formats")
    good = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    formats.read({"messages": good})  # it is good
    for broken in (
        {"messages": [good[0], {**good[1], "content": part}]},
        {"messages": [part, *good]},
        {"messages": [*good, part]},
        {"messages": good, "tools": part},
        {"messages": [good[0], {**good[1], "train": part}]},
        {"messages": good, **row},
    ):
        with contextlib.suppress(ValueError):
            formats.read(broken)


# U+FDD0 and U+FDD1 are no characters, and rows that hold them are refused: tests/data/test_chat.py
said = st.text(min_size=1, max_size=20).filter(lambda text: text.strip() and not {"\ufdd0", "\ufdd1"} & set(text))
# a question may hold anything that a person could paste, also what ends turns and opens others
asked = st.lists(st.one_of(said, st.sampled_from(CONTROL)), min_size=1, max_size=3).map("".join).filter(str.strip)
answer = st.one_of(said, st.sampled_from(["Yes.", "assistant", "user\n", "im_end", "|", "model"]))


@st.composite
def conversations(draw, system):
    turns = [{"role": "system", "content": draw(asked)}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        words = draw(answer)
        # a question that repeats the answer must not draw the mask to itself
        question = draw(st.one_of(asked, st.just(words)))
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": words}]
    return turns


@pytest.mark.parametrize("name", some_slow(NAMES, but=("qwen2.5", "gemma-3")))
@SMALL
@given(data=st.data())
def test_only_the_answers_and_their_end_tokens_are_trained(name, data):
    family = BY_NAME[name]
    turns = data.draw(conversations(family.system))
    train_on = data.draw(st.sampled_from(["assistant", "last_assistant"]))
    make = data.draw(st.sampled_from([as_messages, as_sharegpt]))
    check(family, encode(family, make(turns), train_on), oracle.expected_rows(name, turns, train_on))


@pytest.mark.parametrize("name", some_slow(NAMES, but=("llama-3.1", "mistral-style")))
@SMALL
@given(data=st.data())
def test_a_control_token_that_a_user_writes_is_not_the_control_token(name, data):
    family, tokenizer = BY_NAME[name], tokenizer_of(name)
    turns = data.draw(conversations(family.system))
    plain = [{**turn, "content": "x" if turn["role"] != "assistant" else turn["content"]} for turn in turns]
    control = set(tokenizer.convert_tokens_to_ids(list(family.special)))
    make = data.draw(st.sampled_from([as_messages, as_sharegpt]))

    def num_control(messages):
        examples = encode(family, make(messages), "assistant")
        return [[token for token in example.input_ids if token in control] for example in examples]

    assert num_control(turns) == num_control(plain)


@pytest.mark.parametrize("name", some_slow(NAMES, but=("smollm2",)))
@SMALL
@given(question=asked, more=asked, words=answer)
def test_an_alpaca_row_trains_its_output(name, question, more, words):
    row = {"instruction": question, "input": more, "output": words}
    turns = [{"role": "user", "content": f"{question}\n\n{more}"}, {"role": "assistant", "content": words}]
    expected = oracle.expected_rows(name, turns, "assistant")
    check(BY_NAME[name], encode(BY_NAME[name], row, "assistant"), expected)
