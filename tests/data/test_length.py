"""Nothing is cut in silence: what is kept fits, what is left out says why, and a split row trains each token once."""

import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.data import IGNORE_INDEX, Example, length
from qlora.data.conversation import Conversation
from qlora.data.encoder import TooLong
from qlora.data.masked_examples import encode, encode_prompt
from qlora.recipe import Data
from tests.conftest import messages

LONG = " ".join(f"w{n}" for n in range(60))
TURNS = [
    ("system", "Be brief."),
    ("user", f"First {LONG}"),
    ("assistant", "One."),
    ("user", f"Second {LONG}"),
    ("assistant", "Two."),
]


def fit(tokenizer, turns, max_length, policy, train_on="assistant"):
    conversation = Conversation(messages(turns)) if isinstance(turns, list) else Conversation([], text=turns)
    examples = encode(tokenizer, conversation, train_on)
    return length.fit(tokenizer, conversation, examples, train_on, max_length, policy)


def size(tokenizer, turns):
    (example,) = encode(tokenizer, Conversation(messages(turns)))
    return len(example.input_ids)


@pytest.mark.parametrize("policy", typing.get_args(Data.model_fields["overlong"].annotation))
def test_a_row_that_fits_is_left_as_it_is(tokenizer, policy):
    (example,) = encode(tokenizer, Conversation(messages(TURNS)))
    assert fit(tokenizer, TURNS, len(example.input_ids), policy) == length.Fitted([example])


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_a_long_row_is_left_out_with_its_length(tokenizer, policy):
    total = size(tokenizer, TURNS)
    with pytest.raises(TooLong) as caught:
        fit(tokenizer, TURNS, total - 1, policy)
    assert caught.value.args == (
        f"{total} tokens, data.max_length is {total - 1}",
        f"longer than max_length {total - 1}",
    )


@pytest.mark.parametrize("policy", ["error", "drop", "truncate"])
def test_a_prompt_that_leaves_no_room_is_named_as_the_reason(tokenizer, policy):
    turns = [("user", LONG), ("assistant", "Yes.")]
    prompt = len(encode_prompt(tokenizer, messages(turns[:1])))
    with pytest.raises(TooLong, match=f"the prompt alone is {prompt} tokens, data.max_length is 20"):
        fit(tokenizer, turns, 20, policy)


def test_truncate_keeps_the_first_tokens(tokenizer):
    turns = [("user", "Hi"), ("assistant", LONG)]
    (whole,) = encode(tokenizer, Conversation(messages(turns)))
    fitted = fit(tokenizer, turns, 30, "truncate")
    assert fitted == length.Fitted([Example(whole.input_ids[:30], whole.labels[:30])], cut=True)


def test_truncate_prompt_leaves_out_the_oldest_turns_first(tokenizer):
    shorter = [TURNS[0], *TURNS[3:]]
    fitted = fit(tokenizer, TURNS, size(tokenizer, shorter), "truncate_prompt")
    assert fitted.cut
    assert fitted.examples == encode(tokenizer, Conversation(messages(shorter)))


def test_truncate_prompt_then_cuts_the_beginning_of_the_question_and_nothing_else(tokenizer):
    room = size(tokenizer, [TURNS[0], ("user", "w58 w59"), TURNS[4]]) + 4
    (example,) = fit(tokenizer, TURNS, room, "truncate_prompt").examples
    text = tokenizer.decode(example.input_ids)
    assert room - 3 <= len(example.input_ids) <= room
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("w58 w59<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n")


def test_truncate_prompt_never_cuts_an_answer(tokenizer):
    with pytest.raises(TooLong, match="answer and tool results alone exceed"):
        fit(tokenizer, [("user", "Hi"), ("assistant", LONG)], 30, "truncate_prompt")


@pytest.mark.parametrize("turns", [[("user", "Hi"), ("assistant", LONG)], TURNS, LONG])
@pytest.mark.parametrize("max_length", [8, 30, 31])
def test_a_split_row_trains_every_token_once(tokenizer, turns, max_length):
    conversation = Conversation(messages(turns)) if isinstance(turns, list) else Conversation([], text=turns)
    (whole,) = encode(tokenizer, conversation)
    fitted = fit(tokenizer, turns, max_length, "split")
    assert fitted.split
    assert all(len(piece.input_ids) <= max_length for piece in fitted.examples)
    trained = [label for piece in fitted.examples for label in piece.labels if label != IGNORE_INDEX]
    assert trained == [label for label in whole.labels if label != IGNORE_INDEX]


@given(st.lists(st.booleans(), min_size=2, max_size=80), st.integers(8, 20))
def test_the_pieces_of_a_split_predict_each_target_from_its_own_past(trained, max_length):
    ids = list(range(100, 100 + len(trained)))
    labels = [IGNORE_INDEX, *(token if on else IGNORE_INDEX for token, on in zip(ids[1:], trained[1:], strict=True))]
    pieces = list(length._windows(Example(ids, labels), max_length))
    seen = [(piece.input_ids[at - 1], piece.labels[at]) for piece in pieces for at in range(1, len(piece.labels))]
    wanted = [(ids[at - 1], labels[at]) for at in range(1, len(ids))]
    assert [pair for pair in seen if pair[1] != IGNORE_INDEX] == [pair for pair in wanted if pair[1] != IGNORE_INDEX]
    assert all(len(piece.input_ids) <= max_length for piece in pieces)
