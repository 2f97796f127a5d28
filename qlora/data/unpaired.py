"""Rows with one answer that is labelled good or bad (trl: unpaired preference) -> Unpaired: token ids, and which it is (KTO).

A row is one of supervised training, in any of its formats, with the verdict on its last answer beside it: `label`, true or
false (`kto_tag` in LLaMA-Factory's files). A pair of `chosen` and `rejected` is two such rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ..system.errors import InputError
from . import columns, formats, length, preference, tokens
from .encoder import Encoded
from .masked_examples import IGNORE_INDEX, Example, encode
from .message import is_empty, kind_of
from .supervised import Supervised, without_thoughts

LABEL = "label"
_VERDICTS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class Unpaired:
    """An Example, and whether its answer is a good one. key: 8 bytes, as an unsigned number, that are equal for rows with the
    same prompt and answer."""

    example: Example
    good: bool
    key: int = field(default=0, compare=False)

    @property
    def input_ids(self):
        return self.example.input_ids

    @property
    def labels(self):
        return self.example.labels

    @property
    def num_trained(self):
        return self.example.num_trained


class Mismatched(Sequence):
    """Of each of `rows`, Rows of Unpaired, its prompt with the answer of the next row that has another prompt, cut to the
    longest of `rows`; its label means nothing."""

    def __init__(self, rows):
        self.rows, self._others, self._begins = rows, _next_of_another(rows.keys), rows.numbers("begin")
        lengths = rows.lengths
        self._longest = int(lengths.max(initial=0))
        self.lengths = np.minimum(self._begins + (lengths - self._begins)[self._others], self._longest)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        other = int(self._others[index])
        (ids, labels), begins = self._parts(index), (int(self._begins[index]), int(self._begins[other]))
        ids_of_other, labels_of_other = self._parts(other)
        ids, labels = ids[: begins[0]] + ids_of_other[begins[1] :], labels[: begins[0]] + labels_of_other[begins[1] :]
        return Unpaired(Example(ids[: self._longest], labels[: self._longest]), False)

    def _parts(self, index):
        row = self.rows[int(index)]
        return row.input_ids, row.labels

    def numbers(self, name, dtype=np.uint64):
        """Return a number for each that is equal for equal ones; `name` is "pair", as of Rows."""
        prompts, answers = self.rows.keys, self.rows.numbers(name, np.uint64)[self._others]
        return prompts * np.uint64(0x9E3779B97F4A7C15) + answers


def _next_of_another(keys):
    """Return for each row the number of the next one, around the end, whose key is another; the next one where none is."""
    count = len(keys)
    if count == 0:
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(keys != np.roll(keys, -1))  # rows after which another prompt begins
    if not len(ends):
        return np.roll(np.arange(count), -1)
    following = np.searchsorted(ends, np.arange(count))
    return (ends[following % len(ends)] + 1) % count


class UnpairedPreferences(Supervised):
    """The Encoder of unpaired rows. begin: the first trained token of an example."""

    NUMBERS: ClassVar = {**Supervised.NUMBERS, "begin": "<i4", "good": "<i1", "pair": "<u8"}

    @staticmethod
    def refuse_columns(mapped):
        """See encoder.Encoder."""
        rest = _without_label(mapped)
        if mapped and {preference.CHOSEN, preference.REJECTED} & mapped.keys():
            preference.Preferences.refuse_columns(rest)
        else:
            columns.refuse_no_template(mapped)
            columns.refuse_bad(rest)

    @staticmethod
    def refuse_table(path, header, mapped, ignore):
        """See encoder.Encoder."""
        given = {*header, *(mapped or {})}
        if {preference.CHOSEN, preference.REJECTED} <= given:
            preference.Preferences.refuse_table(path, header, mapped, ignore)
            return
        label = (mapped or {}).get(LABEL) or next((key for key in formats.DESIRABLE if key in header), LABEL)
        if label not in header:
            raise InputError(
                f"{path} has no column {label!r}, which says whether an answer is good; it has {', '.join(header)}. Name "
                "yours in data.columns.label"
            )
        columns.refuse_table(path, header, _without_label(mapped) or None, ignore)

    def read(self, value):
        """Return (format name, Conversation) of a row, of a pair that of the chosen answer; raises ValueError for what is wrong
        with it."""
        name, answers, _ = self._said(value)
        return name, answers[0][0]

    def _said(self, value):
        """Return (format name, [(Conversation, good)], unused keys) of a row."""
        settings = self.settings
        if preference.is_pair(_renamed_pair(value, settings.columns), settings.ignore_keys):
            name, said = preference.read(value, _without_label(settings.columns) or None, settings.ignore_keys)
            answers, unused = [(said.chosen, True), (said.rejected, False)], said.unused
        else:
            rest, good = _verdict(value, settings.columns)
            name, conversation = columns.read(
                rest, _without_label(settings.columns) or None, "auto", settings.ignore_keys
            )
            if conversation.text is not None:
                raise ValueError("is plain text, which has no answer that is good or bad; give prompt and completion")
            answers, unused = [(conversation, good)], conversation.unused
        if settings.thoughts == "drop":
            answers = [(without_thoughts(one), good) for one, good in answers]
        return name, answers, unused

    def encode(self, value):
        settings, masks = self.settings, self.settings.thoughts == "mask"
        name, answers, unused = self._said(value)
        examples, is_cut, unused = [], False, set(unused)
        for conversation, good in answers:
            conversation = dataclasses.replace(conversation, flags=())
            whole = encode(self.tokenizer, conversation, "last_assistant", masks)[-1:]
            fitted = length.fit(
                self.tokenizer, conversation, whole, "last_assistant", settings.max_length, settings.overlong, masks
            )
            examples += [Unpaired(one, good, conversation.key()) for one in fitted.examples]
            unused |= whole[0].left_out
            is_cut |= fitted.cut
        counts = {"rows_truncated": int(is_cut), **tokens.counts_of(self.tokenizer, *(one for one, _ in answers))}
        first = answers[0][0]
        prompt = dataclasses.replace(first, messages=first.messages[:-1], flags=(), completion=None)
        return Encoded(name, prompt.key(), examples, unused, counts)

    def stored(self, example):
        arrays, numbers = super().stored(example.example)
        begin = next(at for at, label in enumerate(example.labels) if label != IGNORE_INDEX)
        return arrays, (*numbers, begin, int(example.good), example.key)

    def restored(self, arrays, numbers):
        return Unpaired(super().restored(arrays, numbers), bool(numbers["good"]), int(numbers["pair"]))


def _without_label(mapped):
    return {name: column for name, column in (mapped or {}).items() if name != LABEL}


def _renamed_pair(value, mapped):
    """Return a row with its two answers by their names, where data.columns gives others."""
    if not isinstance(value, dict):
        return value
    given = {name: (mapped or {}).get(name) for name in (preference.CHOSEN, preference.REJECTED)}
    return {**value, **{name: value.get(column) for name, column in given.items() if column is not None}}


def _verdict(value, mapped):
    """Return (the row without its verdict, whether the answer is good)."""
    if not isinstance(value, dict):
        raise ValueError(f"a row is an object with an answer and its label, not {kind_of(value)}")
    key = (mapped or {}).get(LABEL) or next((key for key in formats.DESIRABLE if key in value), LABEL)
    given = value.get(key)
    if is_empty(given):
        raise ValueError(
            f"has no {key}, which says whether its answer is a good one: true or false; name its column in "
            "data.columns.label, or leave kto out of the recipe for supervised training"
        )
    if isinstance(given, float) and given.is_integer():  # of a Parquet column in which some are missing
        given = int(given)
    text = str(given).strip().lower() if isinstance(given, (bool, int, str)) else None
    if text not in _VERDICTS:
        found = f"{given!r:.80}" if isinstance(given, str) else kind_of(given)
        raise ValueError(f"{key} is {found}, not true or false (or 1 and 0)")
    return {name: inner for name, inner in value.items() if name != key}, _VERDICTS[text]


def good_of(rows):
    """Return the Rows of Unpaired whose answer is good; all of them where none is."""
    good = rows[rows.numbers("good") == 1]
    return good if len(good) else rows


def is_unpaired(row, ignore=()):
    """Return whether a row says of its one answer that it is good or bad."""
    return isinstance(row, dict) and formats.verdict({k: v for k, v in row.items() if k not in ignore}) is not None


def has_label(row, ignore=()):
    """Return whether a row has the key of a verdict, whatever it says."""
    return isinstance(row, dict) and any(key in row and key not in ignore for key in formats.DESIRABLE)


# ---- what the rows are like ------------------------------------------------------------------------------------------


def describe(rows, held_out, parts):
    """Return for data_report.json what training rows are like: {"judged": {"prompts", "desirable", "undesirable",
    "desirable_tokens", "undesirable_tokens", "contradictory"}, "duplicates", "eval_rows_in_training"}.

    desirable, undesirable: rows; *_tokens: the mean of an answer, None where there is none; contradictory: answers that are
    called good and bad. Of held-out rows those count whose prompt is trained on.
    """
    good, trained, once = rows.numbers("good") == 1, rows.num_trained, rows.one_each()
    # not those that a source's weight repeats
    answers, called = once.numbers("pair", np.uint64), once.numbers("good") == 1
    said = np.stack([answers, called.astype(np.uint64)], 1)
    both = np.intersect1d(answers[called], answers[~called])

    def mean(of):
        return float(trained[of].mean()) if of.any() else None

    return {
        "judged": {
            "prompts": len(np.unique(rows.keys)),
            "desirable": int(good.sum()),
            "undesirable": int((~good).sum()),
            "desirable_tokens": mean(good),
            "undesirable_tokens": mean(~good),
            "contradictory": len(both),
        },
        "duplicates": int(len(said) - len(np.unique(said, axis=0))),
        "eval_rows_in_training": int(np.isin(held_out.one_each().keys, rows.keys).sum()),
    }
