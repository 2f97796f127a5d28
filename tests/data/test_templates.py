"""Every row shape through real chat templates: what is trained is what a hand-written oracle says, token by token.

The oracle itself is held against the templates first, so that its strings are the real ones.
"""

import functools
import importlib

import pytest

from tests.data import oracle
from tests.data.families import BY_NAME, FAMILIES

IGNORE_INDEX = -100  # what F.cross_entropy skips
TRAIN_ON = ["assistant", "last_assistant", "completion", "all"]

QUESTION, ANSWER = "Who are you?\n\nSay it in few words.", "Hello there."
SINGLE = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
MULTI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi, say Ciao!"},
    {"role": "assistant", "content": "Hello there."},
    {"role": "user", "content": "And in Italian?\n\nHello there."},
    {"role": "assistant", "content": "Ciao!\n\n日本語 🙂"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye bye."},
]
RAGGED = [
    {"role": "user", "content": " Hi \n"},
    {"role": "assistant", "content": "Hello\n\n  there. \n"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao!\n"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city, in °C",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}}
WITH_TOOLS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the weather in Zürich?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "content": '{"celsius": 21}'},
    {"role": "assistant", "content": "It is 21 °C."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye bye."},
]
THOUGHTS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello there."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "<think>\nThe end.\n</think>\n\nCiao!"},
]


def as_messages(messages):
    return {"messages": messages, "id": 7}


def as_alpaca(messages):
    """Return an alpaca row: instruction and input are what a blank line parts in the last question."""
    system, turns = oracle.system_of(messages)
    contents = [message["content"] for message in turns]
    instruction, _, more = contents[-2].partition("\n\n")
    row = {"instruction": instruction, "input": more, "output": contents[-1]}
    if len(contents) > 2:
        row["history"] = [list(pair) for pair in zip(contents[:-2:2], contents[1:-2:2], strict=True)]
    if system is not None:
        row["system"] = system
    return row


def as_prompt_strings(messages):
    question, answer = messages
    return {"prompt": question["content"], "completion": answer["content"]}


def as_sharegpt(messages):
    system, turns = oracle.system_of(messages)
    names = {"user": "human", "assistant": "gpt"}
    row = {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in turns]}
    return row if system is None else {**row, "system": system}


def as_prompt_lists(messages, num_prompt):
    return {"prompt": messages[:num_prompt], "completion": messages[num_prompt:]}


def as_tools(messages):
    return {"messages": messages, "tools": TOOLS}


class Case:
    """A row, and the conversation that it means."""

    def __init__(self, name, row, messages, tools=None, num_prompt=None):
        self.name, self.row, self.messages, self.tools, self.num_prompt = name, row, messages, tools, num_prompt

    def expected(self, family, train_on):
        return oracle.expected_rows(family.name, self.messages, train_on, self.tools, self.num_prompt)


def cases_of(family):
    """Return the rows that this family's template can show."""
    multi = MULTI if family.system else MULTI[1:]
    first_answer = 3 if family.system else 2  # up to and with it
    cases = [
        Case("messages-single", as_messages(SINGLE), SINGLE),
        Case("messages-multi", as_messages(multi), multi),
        Case("messages-no-system", as_messages(MULTI[1:]), MULTI[1:]),
        Case("messages-ragged", as_messages(RAGGED), RAGGED),
        Case("alpaca-single", as_alpaca(SINGLE), SINGLE),
        Case("alpaca-multi", as_alpaca(multi[:-2]), multi[:-2]),
        Case("prompt-strings", as_prompt_strings(SINGLE), SINGLE, num_prompt=1),
        Case("prompt-lists-single", as_prompt_lists(SINGLE, 1), SINGLE, num_prompt=1),
        Case("prompt-lists-multi", as_prompt_lists(multi, len(multi) - 1), multi, num_prompt=len(multi) - 1),
        # the completion goes on for three messages, two of them answers
        Case("prompt-lists-long", as_prompt_lists(multi, first_answer + 1), multi, num_prompt=first_answer + 1),
        Case("sharegpt-single", as_sharegpt(SINGLE), SINGLE),
        Case("sharegpt-multi", as_sharegpt(multi), multi),
    ]
    if family.tools:
        alone = WITH_TOOLS[1:3]
        nothing_said = [alone[0], {**alone[1], "content": None}]
        cases += [
            Case("tools-call", as_tools(alone), alone, TOOLS),
            Case("tools-call-null", as_tools(nothing_said), nothing_said, TOOLS),
            Case("tools-result", as_tools(WITH_TOOLS[:5]), WITH_TOOLS[:5], TOOLS),
            Case("tools-multi", as_tools(WITH_TOOLS), WITH_TOOLS, TOOLS),
        ]
    if family.name == "qwen3":
        thinking = [*WITH_TOOLS[:2], {**WITH_TOOLS[2], "content": "<think>\nAsk.\n</think>\n\n"}, *WITH_TOOLS[3:]]
        cases += [
            Case("thoughts", as_messages(THOUGHTS), THOUGHTS),
            Case("tools-thought", as_tools(thinking), thinking, TOOLS),
        ]
    return cases


CASES = [
    pytest.param(family, case, id=f"{family}-{case.name}") for family in FAMILIES for case in cases_of(family)
]  # fmt: skip
TRAINED_CASES = [
    pytest.param(family, case, train_on, id=f"{family}-{case.name}-{train_on}")
    for family in FAMILIES
    for case in cases_of(family)
    for train_on in TRAIN_ON
    if case.expected(family, train_on) is not None
]


@functools.cache
def tokenizer_of(name):
    return BY_NAME[name].tokenizer()


def flagged(messages, key, flags):
    """Return the messages with `flags` on the answers, in their order; None sets none."""
    flags = iter(flags)
    marked = []
    for message in messages:
        flag = next(flags) if message["role"] == "assistant" else None
        marked.append(message if flag is None else {**message, key: flag})
    return marked


FLAGS = [
    ("train", (False, None, None), "assistant"),
    ("train", (None, None, False), "assistant"),
    ("train", (True, None, None), "last_assistant"),
    ("train", (True, None, False), "completion"),
    ("weight", (0, 1, 1), "assistant"),
    ("weight", (0, 1, 0), "last_assistant"),
]


# ---- the oracle against the templates themselves


@pytest.mark.parametrize(("family", "case"), CASES)
def test_the_oracle_writes_what_the_template_writes(family, case):
    tokenizer, hand = tokenizer_of(family.name), oracle.ORACLES[family.name]

    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, tools=case.tools, tokenize=False, **options)

    assert hand.finished(case.messages, case.tools) == render(case.messages)
    for i, message in enumerate(case.messages):
        if message["role"] == "assistant":
            prompt = hand.prompt(case.messages[:i], case.tools)
            assert prompt == render(case.messages[:i], add_generation_prompt=True)
            so_far = render(case.messages[: i + 1])
            said = hand.answer(message)
            if so_far.startswith(prompt):
                assert so_far[len(prompt) :].startswith(said)
            else:  # the prompt differs, the answer is still the template's last words
                assert family.name in ("deepseek-r1-distill", "mistral-style")
                assert so_far.endswith(said.rpartition("</think>")[2].lstrip("\n"))
            assert said.endswith(family.end)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_oracle_knows_which_templates_rewrite_earlier_turns(family):
    tokenizer = tokenizer_of(family.name)
    turns = MULTI if family.system else MULTI[1:]

    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    first = next(i for i, message in enumerate(turns) if message["role"] == "assistant")
    row = render(turns[:first], add_generation_prompt=True) + oracle.ORACLES[family.name].answer(turns[first])
    assert render(turns).startswith(row) is not oracle.rewrites(family.name, turns)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_special_tokens_are_one_token_each_and_registered_as_in_the_model(family):
    tokenizer = tokenizer_of(family.name)
    for token in (*family.special, *family.plain):
        assert tokenizer(token, add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids(token)]
    special = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special}
    assert special >= set(family.special)
    assert not special & set(family.plain)
    assert (tokenizer("x").input_ids[0] == tokenizer.bos_token_id) == family.adds_bos


# ---- the pipeline against the oracle


def encode(family, row, train_on):
    """Return the examples that our pipeline makes of a row."""
    formats = importlib.import_module("qlora.data.formats")
    examples = importlib.import_module("qlora.data.masked_examples")
    _, conversation = formats.read(row)
    return examples.encode(tokenizer_of(family.name), conversation, train_on)


def runs_of(tokenizer, example):
    """Return (decoded text, trained) of each run of tokens that are trained or are not."""
    runs = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
        trained = label != IGNORE_INDEX
        if not runs or runs[-1][1] != trained:
            runs.append(([], trained))
        runs[-1][0].append(token)
    return [(tokenizer.decode(run), trained) for run, trained in runs]


def check_text(family, examples, expected):
    """Assert that the examples read as the oracle says, each with one bos where the family has one."""
    tokenizer = tokenizer_of(family.name)
    allowed = [(row.text, row.text + row.tail) for row in expected]
    assert len(examples) == len(expected)
    for example, texts in zip(examples, allowed, strict=True):
        assert tokenizer.decode(example.input_ids) in texts
        if family.leading_bos:
            assert example.input_ids[0] == tokenizer.bos_token_id
            assert list(example.input_ids).count(tokenizer.bos_token_id) == 1


def check(family, examples, expected):
    """Assert that text and mask of the examples are what the oracle says."""
    check_text(family, examples, expected)
    for example, row in zip(examples, expected, strict=True):
        runs = runs_of(tokenizer_of(family.name), example)
        assert [text for text, trained in runs if trained] == row.trained
        before_the_tail = runs if runs[-1][1] else runs[:-1]
        assert before_the_tail == row.runs  # not only which words, but which of several equal ones


@pytest.mark.parametrize(("family", "case", "train_on"), TRAINED_CASES)
def test_what_is_trained_is_what_the_oracle_says(family, case, train_on):
    examples, expected = encode(family, case.row, train_on), case.expected(family, train_on)
    if train_on != "all":
        return check(family, examples, expected)
    check_text(family, examples, expected)
    for example in examples:
        assert list(example.labels) == [IGNORE_INDEX, *example.input_ids[1:]]


@pytest.mark.parametrize(("key", "flags", "train_on"), FLAGS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_flag_on_an_answer_overrides_train_on(family, key, flags, train_on):
    messages = flagged(MULTI if family.system else MULTI[1:], key, flags)
    expected = oracle.expected_rows(family.name, messages, train_on)
    assert expected
    examples = encode(family, as_messages(messages), train_on)
    check(family, examples, expected)


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.system], ids=str)
@pytest.mark.parametrize("make", [as_messages, as_alpaca, as_sharegpt])
def test_a_system_text_that_the_template_refuses_is_an_error(family, make):
    with pytest.raises(ValueError, match=r"(?i)system"):
        encode(family, make(MULTI), "assistant")


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_control_token_in_a_question_stays_text(family):
    tokenizer = tokenizer_of(family.name)
    end = tokenizer.convert_tokens_to_ids(family.end)

    def num_ends(question):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]
        examples = encode(family, as_messages(messages), "assistant")
        if not family.swallows:  # as text the token takes no whitespace along
            check(family, examples, oracle.expected_rows(family.name, messages, "assistant"))
        return list(examples[0].input_ids).count(end)

    assert num_ends(f"What is {family.end} for?") == num_ends("What is it for?")
