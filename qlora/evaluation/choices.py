"""Questions with choices: the choice that a model thinks likeliest, as lm-eval asks for it.

The prompts are those of lm-eval's mmlu and, by the text of the choices, of its mmlu_continuation. So are the tokens: of prompt
and choice together, cut where those of the prompt by itself end. Under a chat template the examples are earlier turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import base_model, methods
from ..data import masked_examples
from ..data.multiple_choice import LETTERS, Question
from ..data.readers.lines import Place
from ..system.errors import InputError
from . import likelihood
from .answer_metrics import ExactMatch
from .scores import Score


@dataclass(frozen=True)
class Prompted:
    """A question as the model sees it. about: what stands before all. shown: (question, answer) of each example. choices: what is
    scored behind it."""

    place: Place
    about: str
    shown: Sequence[tuple[str, str]]
    question: str
    choices: Sequence[str]
    answer: int

    @property
    def text(self) -> str:
        return self.about + "".join(f"{question} {answer}\n\n" for question, answer in self.shown) + self.question

    @property
    def messages(self) -> list[dict[str, str]]:
        turns = [("user", self.question)]
        for question, answer in reversed(self.shown):
            turns = [("user", question), ("assistant", answer), *turns]
        turns[0] = ("user", self.about + turns[0][1])
        return [{"role": role, "content": content} for role, content in turns]

    def tokens(self, tokenizer, chat) -> list[tuple[list[int], list[int]]]:
        """Return (prompt, choice) as token ids for each choice. chat: under the tokenizer's chat template.

        Raises:
            ValueError: the template refuses it.
        """
        if chat:
            prompt = masked_examples.encode_prompt(tokenizer, self.messages)
            return [(prompt, tokenizer(text, add_special_tokens=False).input_ids) for text in self.choices]
        prompt = tokenizer(self.text).input_ids
        return [(prompt, tokenizer(f"{self.text} {choice}").input_ids[len(prompt) :]) for choice in self.choices]


def ask(question: Question, examples: Sequence[Question], num_shots: int, by_text: bool) -> Prompted:
    """Return the question as it is asked, after the first `num_shots` of `examples`: of its subject, where both have one, and
    other than it. by_text: of the choices, not their letters.

    Raises:
        InputError: there are fewer.
    """
    fitting = [
        one
        for one in examples
        if (None in (one.subject, question.subject) or one.subject == question.subject)
        and (one.text, one.choices) != (question.text, question.choices)
    ][:num_shots]
    if len(fitting) < num_shots:
        of = f" of the subject {question.subject!r}" if question.subject else ""
        raise InputError(
            f"--shots {num_shots}: there are {len(fitting)} examples{of} for the question in line {question.place}; "
            "take fewer, or give more in --examples FILE"
        )
    kind = "questions" if by_text else "multiple choice questions"
    subject = (question.subject or "").replace("_", " ")
    about = f"The following are {kind} (with answers) about {subject}.\n\n" if subject else ""
    shown = [(_worded(one, by_text), _choices(one, by_text)[one.answer]) for one in fitting]
    return Prompted(
        question.place, about, shown, _worded(question, by_text), _choices(question, by_text), question.answer
    )


def _worded(question, by_text):
    if by_text:
        return f"Question: {question.text.strip()}\nAnswer:"
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question.choices, strict=False))
    return f"{question.text.strip()}\n{choices}Answer:"


def _choices(question, by_text):
    return question.choices if by_text else LETTERS[: len(question.choices)]


def score(
    model, tokenizer, questions: Sequence[Prompted], chat: bool, batch_size: int, what="scoring choices"
) -> Score:
    """Return the Score of `questions`: acc, the share whose likeliest choice is right, and acc_norm, that of the choice whose
    likelihood a character is highest. Loss is that of the right choices, in nats a token.

    Raises:
        InputError: a question does not fit into the model's positions, or its chat template refuses it.
        DoesNotFit: there is no memory for one row by itself.
    """
    limit, taken = base_model.num_positions(model.config), methods.num_positions(model)
    pairs = []
    for question in questions:
        try:
            own = question.tokens(tokenizer, chat)
        except ValueError as error:
            raise InputError(f"the question in line {question.place}: {error}") from None
        longest = max(len(prompt) + len(choice) for prompt, choice in own) - 1
        if limit is not None and taken + longest > limit:
            raise InputError(
                f"the question in line {question.place} is too long: {longest:,} tokens with its examples, and "
                f"{base_model.said_of_positions(limit, taken)}; take fewer --shots, or leave it out"
            )
        pairs += own
    values = iter(likelihood.log_likelihoods(model, pairs, batch_size, what))
    counts = iter(len(choice) for _, choice in pairs)
    rows = [_Row.of(one, [next(values) for _ in one.choices], [next(counts) for _ in one.choices]) for one in questions]
    parts = {name: np.array([(float(getattr(row, name)), 1.0) for row in rows]) for name in ("acc", "acc_norm")}
    return Score(
        np.array([(row.nats, row.tokens) for row in rows], float),
        [row.chosen for row in rows],
        [one.choices[one.answer] for one in questions],
        dict.fromkeys(parts, ExactMatch()),
        parts,
        bytes_N=np.array([len(one.choices[one.answer].encode()) for one in questions]),
    )


@dataclass(frozen=True)
class _Row:
    """What came of a question: the likeliest choice, whether it and the likeliest a character are right, and the loss of the
    right one."""

    chosen: str
    acc: bool
    acc_norm: bool
    nats: float
    tokens: int

    @classmethod
    def of(cls, question, values, counts):
        likeliest = int(np.argmax(values))
        normed = int(np.argmax([value / len(text) for value, text in zip(values, question.choices, strict=True)]))
        right = question.answer
        return cls(question.choices[likeliest], likeliest == right, normed == right, -values[right], counts[right])
