"""Rows that are longer than data.max_length: refused, dropped, cut or split, as the recipe says, and never in silence."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .encoder import TooLong
from .masked_examples import IGNORE_INDEX, Example, encode
from .tokens import tokenize


@dataclass(frozen=True)
class Fitted:
    """The Examples of one row, each of at most max_length tokens, and whether something was cut off, or split."""

    examples: list
    cut: bool = False
    split: bool = False


def fit(tokenizer, conversation, examples, train_on, max_length, policy, mask_thoughts=False) -> Fitted:
    """Return the Examples of a row under `policy`.

    truncate keeps the first max_length tokens; truncate_prompt leaves out the oldest turns, then the beginning of the last
    question, never the system message or the answer; split makes several Examples, in which every token stands once as a
    target.

    Raises:
        TooLong: `policy` is "error" or "drop", or nothing would be left to train on.
    """
    if max(len(example.input_ids) for example in examples) <= max_length:
        return Fitted(examples)
    if policy == "truncate_prompt" and conversation.text is None:
        return _with_shorter_prompt(tokenizer, conversation, train_on, max_length, mask_thoughts)
    if policy == "split":
        pieces = [piece for example in examples for piece in _windows(example, max_length)]
        return Fitted([piece for piece in pieces if _trains(piece)], split=True)
    if policy == "truncate":
        cut = [Example(example.input_ids[:max_length], example.labels[:max_length]) for example in examples]
        left = [example for example in cut if _trains(example)]
        if left:
            return Fitted(left, cut=True)
    raise TooLong(*_reason(examples, max_length))


def _trains(example):
    return any(label != IGNORE_INDEX for label in example.labels[1:])


def _reason(examples, max_length):
    worst = max(examples, key=lambda example: len(example.input_ids))
    prompt = next(at for at, label in enumerate(worst.labels) if label != IGNORE_INDEX)
    if prompt >= max_length:
        return (
            f"the prompt alone is {prompt} tokens, data.max_length is {max_length}",
            f"prompt alone longer than max_length {max_length}",
        )
    return f"{len(worst.input_ids)} tokens, data.max_length is {max_length}", f"longer than max_length {max_length}"


def _windows(example, max_length):
    """Yield pieces of at most max_length tokens; each begins with the last token of the one before, not trained again."""
    step = max_length - 1
    for start in range(0, max(1, len(example.input_ids) - 1), step):
        end = start + max_length
        first = example.labels[start] if start == 0 else IGNORE_INDEX
        yield Example(example.input_ids[start:end], [first, *example.labels[start + 1 : end]])


def _with_shorter_prompt(tokenizer, conversation, train_on, max_length, mask_thoughts):
    """Leave out as few of the oldest turns as it takes, then as little of the last question's beginning."""

    def encoded(shorter):
        return encode(tokenizer, shorter, train_on, mask_thoughts)

    def fits(examples):
        return max(len(example.input_ids) for example in examples) <= max_length

    messages = conversation.messages
    head = 1 if messages[0]["role"] == "system" else 0
    last_answer = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    starts = [index for index in range(head + 1, last_answer) if messages[index]["role"] == "user"]
    for start in starts:
        examples = encoded(_without(conversation, head, start))
        if fits(examples):
            return Fitted(examples, cut=True)
    shortest = _without(conversation, head, starts[-1]) if starts else conversation
    question = shortest.messages[head]
    if question["role"] == "user":
        begins = tokenize(tokenizer, question["content"]).starts
        low, high = 1, len(begins)  # tokens to leave out; the fewest that fit
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(encoded(_cut(shortest, head, begins[middle]))) else (middle + 1, high)
        if low < len(begins):
            return Fitted(encoded(_cut(shortest, head, begins[low])), cut=True)
    raise TooLong(
        f"system message, answer and tool results alone exceed data.max_length {max_length}",
        f"without its question longer than max_length {max_length}",
    )


def _without(conversation, head, start):
    """Return the conversation without the messages from `head` up to `start`."""
    gone = start - head
    flags = tuple((index - gone, flag) for index, flag in conversation.flags if index >= start)
    completion = None if conversation.completion is None else max(0, conversation.completion - gone)
    messages = conversation.messages[:head] + conversation.messages[start:]
    return replace(conversation, messages=messages, flags=flags, completion=completion)


def _cut(conversation, index, begin):
    messages = list(conversation.messages)
    messages[index] = {**messages[index], "content": messages[index]["content"][begin:].lstrip() or "."}
    return replace(conversation, messages=messages)
