"""What is asked while a model trains: the first held-out rows, answered beside what they expect."""

from __future__ import annotations

from dataclasses import dataclass

from ... import data
from ...data import chat
from ...evaluation import generate, scores
from ...evaluation.sampling import Sampling
from ...kernels import attention
from ...system.errors import InputError
from ...system.events import note, progress


@dataclass(frozen=True)
class Question:
    """prompt: token ids of `messages`, those before the answer that is expected."""

    messages: list
    prompt: list
    expected: str


def questions(prepared):
    """Return the Questions of the first held-out rows of Prepared data, as many as training.num_samples.

    Raises:
        InputError: the rows are plain text, to which there is no answer.
    """
    count = prepared.recipe.training.num_samples
    if not count:
        return []
    held_out = prepared.eval_examples
    if held_out.are_unpaired:
        held_out = data.unpaired.good_of(held_out)  # bad answers are not expected
    rows = data.conversations(held_out.first_rows(count))
    if not all(row.messages for row in rows):
        raise InputError("training.num_samples: the held-out rows are plain text without answers; leave it out")
    tokenizer = prepared.tokenizer
    return [
        Question(row.messages[:-1], scores.prompt_of(tokenizer, row), scores.reference_of(tokenizer, row))
        for row in rows
    ]


def asked_of(model, tokenizer, asked):
    """Return a function of go_on, which is called with each word, that yields the samples of runs.record.Samples; None where
    no Questions are `asked`, or there is no position for an answer to any of them."""
    fitting = [one for one in asked if _has_room(model, one)]
    if len(fitting) < len(asked):
        note(f"samples   {len(fitting)} of {len(asked)}: the prompts of the others fill all positions of the model")
    if not fitting:
        return None
    most = scores.most_tokens(tokenizer, [one.expected for one in asked])
    stops = chat.stop_token_ids(tokenizer, model.generation_config)

    attending = attention.as_now(model)

    def samples(go_on):
        with progress("answering", len(fitting), "rows") as advance:
            for one in fitting:
                with attending():  # in training rows are joined, and kept apart by `segments`
                    answer = generate.stream(model, tokenizer, one.prompt, stops, Sampling(most), lambda _: go_on())
                advance(1)
                yield {"prompt": one.messages, "expected": one.expected, "answer": answer}

    return samples


def _has_room(model, one):
    try:
        return generate.limit_of(model, one.prompt, 1) > 0
    except InputError:
        return False
