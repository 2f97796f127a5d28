"""Rows of a prompt and two answers, of which one is preferred -> Pairs: two sequences of token ids that begin alike.

A row has `chosen` and `rejected`, and its prompt in one of these ways:

    prompt                     a string, or messages
    messages, conversations    messages, as of OpenAI and of ShareGPT
    instruction, input         as of Alpaca
    none                       the messages with which both begin; or, where both are strings, "\\n\\nHuman: " and so on

Template, masks and tokens are those of supervised training: each answer is trained as `chat` will meet it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from . import columns, formats, sources, tokens
from .conversation import CONTEXT, Conversation
from .encoder import Encoded, Settings, TooLong
from .formats.completion import messages_in
from .masked_examples import IGNORE_INDEX, Example, encode
from .message import is_empty, kind_of
from .supervised import without_thoughts

CHOSEN, REJECTED = "chosen", "rejected"
_PROMPTS = ("prompt", "messages", "conversations", "instruction")  # the first that a row has is its prompt
_NAMES = (*_PROMPTS, "input", *CONTEXT, CHOSEN, REJECTED)
_MESSAGE = re.compile(r"prompt \+ completion\[(\d+)\]")  # as formats.read numbers them
_TURNS = re.compile(r"\n\n(Human|Assistant):")  # of Anthropic's HH
_NOT_THE_MODEL = ("user", "human", "system")
_SWAPPED = 1  # of a pair's key: which of its answers is preferred
_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))


@dataclass(frozen=True)
class Pair:
    """Two Examples of one prompt. Where one sequence is wanted, as of sizes, it is both, one after the other. key: 8 bytes, as an
    unsigned number, that are equal for rows that say the same."""

    chosen: Example
    rejected: Example
    key: int = field(default=0, compare=False)

    @property
    def input_ids(self):
        return [*self.chosen.input_ids, *self.rejected.input_ids]

    @property
    def labels(self):
        return [*self.chosen.labels, *self.rejected.labels]

    @property
    def num_trained(self):
        return self.chosen.num_trained + self.rejected.num_trained


class Answers(Sequence):
    """The chosen (which=0) or rejected (1) Examples of a sequence of Pairs, as supervised ones; read when asked for."""

    def __init__(self, pairs, which=0):
        self.pairs, self.which = pairs, which

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Answers(self.pairs[index], self.which)
        pair = self.pairs[index]
        return pair.rejected if self.which else pair.chosen

    def row_numbers(self):
        return self.pairs.row_numbers()


@dataclass(frozen=True)
class Preferred:
    """What a row says: two Conversations whose `completion` is where they part. better: by how much the chosen answer is scored
    higher; None: the row does not say. unused: keys of the row that are in neither."""

    chosen: Conversation
    rejected: Conversation
    better: float | None
    unused: tuple

    def key(self):
        """Return 8 bytes, as an unsigned number, that are equal for rows of one prompt, whatever its answers."""
        said = self.chosen
        return dataclasses.replace(said, messages=said.messages[: said.completion]).key()

    def pair_key(self):
        """Return the same for rows of the same prompt and answers, of which the same is trained. Of a row that prefers the other
        answer of the two it differs in the last bit alone."""
        both = [str((one.key(), one.completion, one.flags)) for one in (self.chosen, self.rejected)]
        digest = hashlib.blake2b(str(sorted(both)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") & ~_SWAPPED | (_SWAPPED if both[0] > both[1] else 0)


class Preferences:
    """The Encoder of pairs."""

    ARRAYS: ClassVar = {"tokens": "<i4", "trained": "?"}
    # split: tokens of the chosen sequence; answer: how many of them are trained; last: the last one of these. trained: of both
    NUMBERS: ClassVar = {"trained": "<i4", "last": "<i4", "split": "<i4", "answer": "<i4", "pair": "<u8"}
    COUNTS = ("rows_truncated", *tokens.OF_CONVERSATIONS, "pairs_tied", "pairs_reversed")
    LENGTH = None

    open_source, not_read = staticmethod(sources.open_source), staticmethod(sources.not_read)

    def __init__(self, tokenizer, settings: Settings):
        self.tokenizer, self.settings = tokenizer, settings

    @staticmethod
    def refuse_columns(mapped):
        """See encoder.Encoder."""
        columns.refuse_other_names(mapped, _NAMES, "preference pairs")

    @staticmethod
    def refuse_table(path, header, mapped, ignore):
        """See encoder.Encoder."""
        remedy = "Name those that hold the two answers: data.columns={prompt: ..., chosen: ..., rejected: ...}"
        columns.refuse_missing(path, header, {CHOSEN: CHOSEN, REJECTED: REJECTED, **(mapped or {})}, remedy)

    def identity(self):
        return tokens.identity(self.tokenizer)

    def read(self, value):
        """Return (format name, Conversation of the chosen answer) of a row; raises ValueError for what is wrong with it."""
        name, said = self._said(value)
        return name, said.chosen

    def _said(self, value):
        settings = self.settings
        name, said = read(value, settings.columns, settings.ignore_keys)
        if settings.thoughts == "drop":
            both = {which: without_thoughts(getattr(said, which)) for which in (CHOSEN, REJECTED)}
            said = dataclasses.replace(said, **both)
        return name, said

    def encode(self, value):
        masks = self.settings.thoughts == "mask"
        name, said = self._said(value)
        both = said.chosen, said.rejected
        examples = [
            self._one(conversation, which) for conversation, which in zip(both, (CHOSEN, REJECTED), strict=True)
        ]
        _refuse_unlike_prompts(examples, masks)
        if examples[0] == examples[1]:
            raise ValueError("chosen and rejected are the same answer: there is nothing to prefer")
        fitted = [self._fitted(example) for example in examples]
        if fitted[0] == fitted[1]:
            raise TooLong(
                f"chosen and rejected are the same up to data.max_length {self.settings.max_length:,}",
                f"the same up to max_length {self.settings.max_length}",
            )
        counts = {
            "rows_truncated": int(fitted != examples),
            **tokens.counts_of(self.tokenizer, *both),
            "pairs_tied": int(said.better == 0),
            "pairs_reversed": int(said.better is not None and said.better < 0),
        }
        unused = {*said.unused, *examples[0].left_out, *examples[1].left_out}
        return Encoded(name, said.key(), [Pair(fitted[0], fitted[1], said.pair_key())], unused, counts)

    def _one(self, conversation, which):
        found = encode(self.tokenizer, conversation, "completion", self.settings.thoughts == "mask")
        if len(found) != 1:
            raise ValueError(
                f"{which} has {len(found)} messages of the assistant, and the chat template shows earlier ones otherwise once "
                "later ones follow; give its last answer only, and the others in the prompt"
            )
        return found[0]

    def _fitted(self, example):
        """Return the Example of at most max_length tokens; raises TooLong."""
        limit, length = self.settings.max_length, len(example.input_ids)
        if length <= limit:
            return example
        cut = Example(example.input_ids[:limit], example.labels[:limit])
        if self.settings.overlong == "truncate" and cut.num_trained:
            return cut
        raise TooLong(f"{length:,} tokens, data.max_length is {limit:,}", f"longer than max_length {limit}")

    def stored(self, example):
        chosen = example.chosen
        last = next(label for label in reversed(chosen.labels) if label != IGNORE_INDEX)
        trained = [label != IGNORE_INDEX for label in example.labels]
        return (example.input_ids, trained), (
            sum(trained),
            last,
            len(chosen.input_ids),
            chosen.num_trained,
            example.key,
        )

    def restored(self, arrays, numbers):
        ids, trained = arrays
        labels, split = np.where(trained, ids, IGNORE_INDEX), int(numbers["split"])
        chosen, rejected = (
            Example(ids[part].tolist(), labels[part].tolist()) for part in (slice(split), slice(split, None))
        )
        return Pair(chosen, rejected, int(numbers["pair"]))


def _refuse_unlike_prompts(examples, masks):
    """Raise ValueError unless both begin with the same tokens before what is trained. masks: thoughts are not."""
    begins = [next(at for at, label in enumerate(one.labels) if label != IGNORE_INDEX) for one in examples]
    prompts = [one.input_ids[:begin] for one, begin in zip(examples, begins, strict=True)]
    if not masks and prompts[0] != prompts[1]:
        raise ValueError(
            "the chat template shows another prompt before chosen than before rejected; give data.chat_template"
        )


# ---- a row -> two conversations --------------------------------------------------------------------------------------


def is_pair(row, ignore=()):
    """Return whether a row has two answers of which one is preferred."""
    return isinstance(row, dict) and all(key not in ignore and not is_empty(row.get(key)) for key in (CHOSEN, REJECTED))


def read(value, mapped=None, ignore=()):
    """Return (format name, Preferred) of a row. mapped, ignore: data.columns, data.ignore_keys.

    Raises:
        ValueError: what is wrong with the row and what is allowed, without file and line.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a row is an object with chosen and rejected, not {kind_of(value)}")
    row = {key: inner for key, inner in columns.renamed(value, mapped).items() if key not in ignore}
    _refuse_without_answers(row)
    if (label := formats.verdict(row)) is not None:
        raise ValueError(
            f"has {label}: {str(row[label]).lower()} beside chosen and rejected, which say themselves which answer is better; "
            f"leave it out with data.ignore_keys: [{label}]"
        )
    answers = [_answer(row[key], key) for key in (CHOSEN, REJECTED)]
    name = next((key for key in _PROMPTS if not is_empty(row.get(key))), None)
    if name is None and all(isinstance(one, str) for one in answers):
        answers, whole = [_turns_of(text, key) for text, key in zip(answers, (CHOSEN, REJECTED), strict=True)], True
    else:
        answers = [[{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in answers]
        whole = _are_whole(answers)
    if whole:
        prompt, answers = _parted(answers)
        _refuse_other_prompt(row.get("prompt"), prompt)
    else:
        prompt = _prompt(row, name)
    taken = {CHOSEN, REJECTED, "input", "completion", *_PROMPTS}
    rest = {key: inner for key, inner in row.items() if key not in taken}
    said = [_conversation({**rest, "prompt": prompt, "completion": one}, key, len(prompt), ignore)
            for one, key in zip(answers, (CHOSEN, REJECTED), strict=True)]  # fmt: skip
    used = {CHOSEN, REJECTED, *CONTEXT, name} | ({"input"} if name == "instruction" else set())
    unused = {str(key) for key, inner in value.items() if key not in used and not is_empty(inner)}
    unused = {*columns.unused(value, mapped)} if mapped else unused
    unused |= {key for one in said for key in one.unused}
    found = Preferred(said[0], said[1], _better(value), tuple(sorted(unused)))
    return " + ".join([*filter(None, [name]), CHOSEN, REJECTED]), found


def _conversation(row, key, num_prompt, ignore):
    """Return the Conversation of a row's prompt and of its answer `key`; what is wrong with that is said of it by its name."""
    try:
        return formats.read(row, "completion", ignore)[1]
    except ValueError as error:
        raise ValueError(_MESSAGE.sub(lambda found: _named(int(found[1]), key, num_prompt), str(error))) from None


def _named(at, key, num_prompt):
    return f"prompt[{at}]" if at < num_prompt else f"{key}[{at - num_prompt}]"


def _refuse_without_answers(row):
    missing = [key for key in (CHOSEN, REJECTED) if key not in row]
    if len(missing) == 2:
        has_label = formats.verdict(row) is not None
        what = "one answer with its label (KTO), which is no pair" if has_label else "a row for supervised training"
        raise ValueError(
            f"has neither chosen nor rejected, only {', '.join(map(str, row)) or 'nothing'}: {what}; "
            "give pairs, name their columns in data.columns, or leave the objective out of the recipe"
        )
    if missing:
        raise ValueError(f"has no {missing[0]}; a pair has both chosen and rejected")
    for key in (CHOSEN, REJECTED):
        if is_empty(row[key]) or (isinstance(row[key], str) and not row[key].strip()):
            raise ValueError(f"{key} is empty")


def _answer(value, key) -> Any:
    """Return an answer as a string or a list of messages."""
    value = messages_in(value)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, (str, list)):
        raise ValueError(f"{key} is {kind_of(value)}, not a string, a message or a list of messages")
    return value


def _turns_of(text, key):
    """Return the messages of a text with Human: and Assistant: before each turn."""
    first, *turns = _TURNS.split(text)
    if first.strip() or not turns:
        raise ValueError(
            f"{key} is a string, and there is no prompt: give prompt, or let {key} begin with '\\n\\nHuman: '"
        )
    roles, said = turns[::2], turns[1::2]
    return [
        {"role": {"Human": "user", "Assistant": "assistant"}[role], "content": content.strip()}
        for role, content in zip(roles, said, strict=True)
    ]


def _are_whole(answers):
    """Return whether both answers are whole conversations, prompt and all."""
    found = [_role(one[0]) not in ("assistant", "gpt", "tool", "function_call", "observation") for one in answers]
    if found[0] != found[1]:
        raise ValueError("one of chosen and rejected is a whole conversation and the other an answer; give both alike")
    return found[0]


def _role(message):
    return message.get("role", message.get("from")) if isinstance(message, dict) else None


def _parted(answers):
    """Return (the messages with which both conversations begin, the two rests)."""
    chosen, rejected = answers
    least = min(len(chosen), len(rejected)) - 1
    same = next((at for at in range(least) if chosen[at] != rejected[at]), least)
    rests = chosen[same:], rejected[same:]
    for name, whole in ((CHOSEN, chosen), (REJECTED, rejected)):
        if _role(whole[-1]) in _NOT_THE_MODEL:
            raise ValueError(f"{name} ends with a message of the {_role(whole[-1])}; a pair ends with an answer")
    if any(_role(message) in _NOT_THE_MODEL for rest in rests for message in rest):
        raise ValueError(
            f"chosen and rejected differ in message {same} already; a pair has one prompt and differs in its answer"
        )
    return chosen[:same], rests


def _refuse_other_prompt(given, prompt):
    """Raise ValueError if a row's own prompt is none of the messages before its answers, which are whole conversations."""
    if is_empty(given):
        return
    texts = [message.get("content", message.get("value")) for message in prompt if isinstance(message, dict)]
    if given not in texts and messages_in(given) != prompt:
        raise ValueError(
            "prompt says something else than the messages before the answers; leave one out (data.ignore_keys: [prompt])"
        )


def _prompt(row, name):
    """Return the messages of a row's prompt."""
    if name is None:
        raise ValueError(
            f"has no prompt: give {', '.join(_PROMPTS[:-1])} or {_PROMPTS[-1]}, or whole conversations as answers"
        )
    given = messages_in(row[name])
    if name == "instruction":
        for key in ("instruction", "input"):
            if not isinstance(row.get(key), str) and (key == "instruction" or row.get(key) is not None):
                raise ValueError(f"{key} is {kind_of(row.get(key))}, not a string")
        given = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    if isinstance(given, str) and name in ("prompt", "instruction"):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise ValueError(f"{name} is {kind_of(given)}, not {'a string or ' * (name == 'prompt')}a list of messages")
    return given


def _better(value):
    """Return by how much a row scores its chosen answer higher, None where it does not."""
    for chosen, rejected in _SCORES:
        scores = [value.get(key) for key in (chosen, rejected)]
        if all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in scores):
            with contextlib.suppress(OverflowError):  # a number with 400 digits
                return float(scores[0] - scores[1])
    return None


# ---- what the pairs are like -----------------------------------------------------------------------------------------


def describe(rows, held_out, parts):
    """Return for data_report.json what training rows are like: {"preference": {"prompts", "chosen_longer", "chosen_tokens",
    "rejected_tokens", "tied", "reversed", "contradictory"}, "duplicates", "eval_rows_in_training"}.

    chosen_longer: share of pairs; *_tokens: the mean of an answer; contradictory: rows of which another row prefers the other
    answer of the same two; a third answer between them (A over B, B over C) contradicts nothing. Of held-out rows those count
    whose prompt is trained on.
    """
    chosen = rows.numbers("answer")
    rejected = rows.num_trained - chosen
    pairs = rows.one_each().numbers("pair", np.uint64)  # not those that a source's weight repeats
    return {
        "preference": {
            "prompts": len(np.unique(rows.keys)),
            "chosen_longer": float((chosen > rejected).mean()),
            "chosen_tokens": float(chosen.mean()),
            "rejected_tokens": float(rejected.mean()),
            "tied": sum(part.summary["pairs_tied"] for part in parts),
            "reversed": sum(part.summary["pairs_reversed"] for part in parts),
            "contradictory": int(np.isin(pairs ^ np.uint64(_SWAPPED), pairs).sum()),
        },
        "duplicates": int(len(pairs) - len(np.unique(pairs))),
        "eval_rows_in_training": int(np.isin(held_out.one_each().keys, rows.keys).sum()),
    }
