"""The tokens of a training row are those that chat makes of the prompt, and then the answer's own."""

import copy
import functools
from pathlib import Path

import pytest

from qlora import base_model
from qlora.data import IGNORE_INDEX, chat
from qlora.data.conversation import Conversation
from qlora.data.masked_examples import encode, encode_prompt
from qlora.data.words import without_thoughts
from qlora.recipe import Model
from tests.conftest import some_slow
from tests.data.families import BY_NAME, FAMILIES
from tests.data.test_matrix import _TOLD, _TOOLS, IN_CI, _turn, templates, tokenizer_of

SMOLLM2 = Path("~/.cache/qlora/SmolLM2-135M-Instruct").expanduser()
BEGINNINGS = ["", "\n", "\n\n", "\n\n\n", " ", "  ", "    ", "\t", "\t\n", " \n ", "\r\n", "\u00a0", "5", "é", "…", "<"]


@functools.cache
def smollm2():
    return base_model.load_tokenizer(SMOLLM2, Model(name_or_path=str(SMOLLM2)))


def tokenizers():
    yield from ((f"trl {name}", lambda name=name: tokenizer_of(name)) for name in templates())
    yield from ((family.name, family.tokenizer) for family in FAMILIES)
    if SMOLLM2.is_dir():
        yield "SmolLM2", smollm2


def spans(example):
    """Return [(first, last), ...] of the runs of trained tokens."""
    trained = [label != IGNORE_INDEX for label in example.labels]
    starts = [at for at in range(len(trained)) if trained[at] and not trained[at - 1]]
    return [(at, next((end for end in range(at, len(trained)) if not trained[end]), len(trained)) - 1) for at in starts]


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in tokenizers()])
def test_before_each_answer_stand_the_tokens_that_chat_makes_of_the_prompt(make):
    tokenizer = make()
    for begins in BEGINNINGS:
        messages = [
            _turn("user", "Hi"),
            _turn("assistant", f"{begins}One."),
            _turn("user", "So?"),
            _turn("assistant", f"{begins}Two."),
        ]
        found = [(example, *span) for example in encode(tokenizer, Conversation(messages)) for span in spans(example)]
        for (example, first, last), index in zip(found, (1, 3), strict=True):
            assert example.input_ids[:first] == encode_prompt(tokenizer, messages[:index]), begins
            said = tokenizer.decode(example.input_ids[first:last])
            assert said.endswith(messages[index]["content"].strip()), (begins, said)
            assert example.input_ids[last] in chat.stop_token_ids(tokenizer)


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"{SMOLLM2} is not there; scripts/quickstart.sh fetches it")
@pytest.mark.parametrize("begins", BEGINNINGS)
def test_an_answer_keeps_its_own_white_space(begins):
    """SmolLM2's template writes the words as they are."""
    tokenizer = smollm2()
    (example,) = encode(tokenizer, Conversation([_turn("user", "Hi"), _turn("assistant", f"{begins}One.")]))
    [(first, last)] = spans(example)
    assert tokenizer.decode(example.input_ids[first:last]) == f"{begins}One."


def test_what_follows_an_unfinished_border_is_a_row_of_its_own():
    """The second prompt that chat makes has the border of the first answer merged, which the first answer must not have."""
    tokenizer = BY_NAME["smollm2"].tokenizer()
    messages = [_turn("user", "Hi"), _turn("assistant", "\n\nOne."), _turn("user", "So?"), _turn("assistant", "Two.")]
    first, second = encode(tokenizer, Conversation(messages))
    ((at, _),) = spans(first)
    assert first.input_ids[:at] == encode_prompt(tokenizer, messages[:1])
    assert second.input_ids[:at] != first.input_ids[:at]
    assert len(encode(tokenizer, Conversation(messages), "last_assistant")) == 1


# ---- thoughts --------------------------------------------------------------------------------------------------------

THOUGHT = "Let me see, or not."
OPENS = [name for name in templates() if "<think>" in chat.render(tokenizer_of(name), [_turn("user", "x")], True)[-12:]]


@pytest.mark.parametrize("name", [*OPENS, "qwen3", "llama3"])
def test_masked_thoughts_are_seen_and_not_trained(name):
    tokenizer = tokenizer_of(name)
    if name == "qwen3_5_nothink":
        pytest.skip("its prompt closes the thought")
    messages = [_turn("user", "Why?"), _turn("assistant", f"<think>\n{THOUGHT}\n</think>\n\nBecause.")]
    (kept,) = encode(tokenizer, Conversation(messages))
    (masked,) = encode(tokenizer, Conversation(messages), mask_thoughts=True)
    assert masked.input_ids == kept.input_ids
    said = tokenizer.decode([label for label in masked.labels if label != IGNORE_INDEX])
    assert THOUGHT in tokenizer.decode(masked.input_ids)
    assert not any(word in said for word in ("Let", "see", "not."))
    assert said.split()[:2] == ["</think>", "Because." + said.split("Because.")[1].split()[0]]
    (none,) = encode(tokenizer, Conversation(without_thoughts(messages)), mask_thoughts=True)
    assert THOUGHT not in tokenizer.decode(none.input_ids)


@pytest.mark.parametrize("name", OPENS)
@pytest.mark.parametrize("thought", ["", THOUGHT])
def test_a_thought_that_the_prompt_opens_is_closed(name, thought):
    """Also one without words: a server would take the whole answer for a thought."""
    tokenizer = tokenizer_of(name)
    if name == "qwen3_5_nothink":
        pytest.skip("its prompt closes the thought")
    content = f"<think>\n{thought}\n</think>\n\nBecause." if thought else "Because."
    (example,) = encode(tokenizer, Conversation([_turn("user", "Why?"), _turn("assistant", content)]))
    text = tokenizer.decode(example.input_ids)
    assert text.count("<think>") == text.count("</think>") == 1
    assert "".join(text.partition("<think>")[2].partition("Because.")[0].split()) == "".join(
        f"{thought}</think>".split()
    )


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (_turn("assistant", "<think>a</think>"), "has thoughts and nothing else"),
        (_turn("assistant", "a</think>b"), "has </think> without <think> before it"),
    ],
)
def test_thoughts_that_cannot_be_dropped_are_an_error(message, problem):
    with pytest.raises(ValueError, match=f"message 1 {problem}"):
        without_thoughts([_turn("user", "Q"), message])


def test_dropped_thoughts_leave_words_and_calls():
    told = [
        _TOLD[0],
        {**_TOLD[1], "reasoning_content": "Hm."},
        *_TOLD[2:-1],
        _turn("assistant", "<think>Aha.</think>\n\n31.5"),
    ]
    assert without_thoughts(told) == [*_TOLD[:-1], _turn("assistant", "31.5")]


# ---- the system message ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some_slow(templates(), but=IN_CI))
def test_a_system_message_can_become_the_beginning_of_the_first_question(name):
    tokenizer = copy.deepcopy(tokenizer_of(name))
    system, rest = _turn("system", "Speak Latin."), [_turn("user", "Hello."), _turn("assistant", "Salve.")]
    joined = [_turn("user", "Speak Latin.\n\nHello."), rest[1]]
    expected = encode(tokenizer, Conversation(joined))
    assert "the system message becomes the beginning" in chat.set_template(tokenizer, None, system_as_user=True)
    assert encode(tokenizer, Conversation([system, *rest])) == encode(tokenizer, Conversation(joined)) == expected
    assert encode_prompt(tokenizer, [system, rest[0]]) == encode_prompt(tokenizer, joined[:1])


def test_a_template_without_a_system_role_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"System role not supported; set data\.system_as_user=true"):
        encode(tokenizer_of("gemma"), Conversation([_turn("system", "x"), _turn("user", "Q"), _turn("assistant", "A")]))


# ---- many answers ----------------------------------------------------------------------------------------------------


def test_a_conversation_that_would_become_a_million_tokens_is_refused_with_the_remedy():
    question, answer = _turn("user", "x " * 400), _turn("assistant", "y " * 400)
    conversation = Conversation([question, answer] * 60)
    with pytest.raises(ValueError, match=r"each of its 60 answers .*set data\.train_on=last_assistant"):
        encode(tokenizer_of("qwen3"), conversation)
    assert len(encode(tokenizer_of("qwen3"), conversation, "last_assistant")) == 1


def test_calls_of_glm_end_with_the_marker_of_what_follows():
    tokenizer = tokenizer_of("glm4moe")
    (example,) = encode(tokenizer, Conversation(_TOLD[:2], _TOOLS))
    assert tokenizer.decode([example.labels[-1]]) == "<|observation|>"
    (example,) = encode(tokenizer, Conversation(_TOLD, _TOOLS))
    assert [tokenizer.decode([example.input_ids[last]]) for _, last in spans(example)] == [
        "<|observation|>",
        "<|user|>",
    ]


@pytest.mark.parametrize("name", OPENS)
def test_what_a_model_said_after_a_prompt_that_opens_the_thought_is_trained_as_it_was_said(name):
    """It has </think> without <think>, as the prompt has that. The earlier thought is gone in the second prompt, or whole."""
    tokenizer = tokenizer_of(name)
    if name == "qwen3_5_nothink":
        pytest.skip("its prompt closes the thought")
    said = [_turn("assistant", f"2+2 is {n}.\n</think>\n\nIt is {n}.") for n in (4, 6)]
    rows = encode(tokenizer, Conversation([_turn("user", "2+2?"), said[0], _turn("user", "3+3?"), said[1]]))
    trained = [tokenizer.decode(row.input_ids[first:last]) for row in rows for first, last in spans(row)]
    assert ["".join(text.split()) for text in trained] == ["".join(message["content"].split()) for message in said]
    assert all(row.input_ids.count(tokenizer.convert_tokens_to_ids("<think>")) <= len(spans(row)) + 1 for row in rows)
