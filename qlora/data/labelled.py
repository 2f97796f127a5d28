"""Rows of a text, or a pair of texts, and a label -> examples: token ids as the tokenizer itself makes them, and a class.

Unlike the words of a conversation the text is tokenized as pipeline("text-classification") does: with the tokenizer's own special
tokens around it, a pair with its separator, and control tokens in it as such.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from . import columns, labels, sources
from .encoder import Encoded, Settings, TooLong
from .message import kind_of, refuse_surrogates

TEXT, PAIR = "text", "text_pair"
_NAMES = (TEXT, PAIR, labels.COLUMN)


@dataclass(frozen=True)
class Labelled:
    """input_ids: list of ints. token_type_ids: which of a pair each token is of. label: the number of the class."""

    input_ids: list
    token_type_ids: list
    label: int


@dataclass(frozen=True)
class Said:
    """What a row says. pair: the second text, None where there is one only; label: the name of a class, as in the row."""

    text: str
    pair: str | None
    label: str
    unused: tuple = ()

    def key(self):
        """Return 8 bytes, as an unsigned number, that are equal for rows of the same texts, whatever their label."""
        texts = json.dumps([self.text, self.pair])
        return int.from_bytes(hashlib.blake2b(texts.encode(), digest_size=8).digest(), "little")


class LabelledText:
    """The Encoder of text classification. settings.labels: the names of the classes."""

    ARRAYS: ClassVar = {"tokens": "<i4", "types": "?"}
    NUMBERS: ClassVar = {labels.COLUMN: "<i4"}
    COUNTS = ("rows_truncated", "rows_with_pairs", labels.BY_PLACE)
    LENGTH = None

    open_source, not_read = staticmethod(sources.open_source), staticmethod(sources.not_read)

    def __init__(self, tokenizer, settings: Settings):
        self.tokenizer, self.settings = tokenizer, settings

    @staticmethod
    def refuse_columns(mapped):
        """See encoder.Encoder."""
        columns.refuse_other_names(mapped, _NAMES, "rows with classes")

    @staticmethod
    def refuse_table(path, header, mapped, ignore):
        """See encoder.Encoder."""
        remedy = f"Name those that hold text and class: data.columns={{text: {header[0]}, label: {header[-1]}}}"
        columns.refuse_missing(path, header, _mapping(mapped), remedy)

    def identity(self):
        backend = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        return [backend, {key: str(value) for key, value in self.tokenizer.special_tokens_map.items()}]

    def read(self, value):
        """Return ("text" or "pair", Said) of a row; raises ValueError for what is wrong with it."""
        if not isinstance(value, dict):
            raise ValueError(f"a row is an object with {TEXT} and {labels.COLUMN}, not {kind_of(value)}")
        mapped = _mapping(self.settings.columns, value)
        row = columns.renamed(value, mapped)
        texts = [row[TEXT], row.get(PAIR)]
        for name, text in zip((TEXT, PAIR), texts, strict=True):
            if text is None and name == PAIR:
                continue
            if not isinstance(text, str):
                raise ValueError(f"{name} is {kind_of(text)}, not a string")
            if not text.strip():
                raise ValueError(f"{name} is empty")
            refuse_surrogates(name, text)
        said = Said(texts[0], texts[1], labels.said(row[labels.COLUMN]), columns.unused(value, mapped))
        return "text" if said.pair is None else "pair", said

    def encode(self, value):
        name, said = self.read(value)
        number = labels.number_of(said.label, self.settings.labels)
        limit, cuts = self.settings.max_length, self.settings.overlong == "truncate"
        encoding = self.tokenizer(said.text, said.pair, return_token_type_ids=True, verbose=False)
        num_tokens = len(encoding.input_ids)
        if num_tokens > limit and not cuts:
            raise TooLong(f"{num_tokens:,} tokens, data.max_length is {limit:,}", "longer than data.max_length")
        if num_tokens > limit:
            encoding = self.tokenizer(
                said.text,
                said.pair,
                return_token_type_ids=True,
                truncation="longest_first",
                max_length=limit,
                verbose=False,
            )
        counts = {
            "rows_truncated": int(num_tokens > limit),
            "rows_with_pairs": int(said.pair is not None),
            labels.BY_PLACE: int(said.label not in self.settings.labels),
        }
        example = Labelled(encoding.input_ids, encoding.token_type_ids, number)
        return Encoded(name, said.key(), [example], said.unused, counts)

    def stored(self, example):
        return (example.input_ids, example.token_type_ids), (example.label,)

    def restored(self, arrays, numbers):
        ids, types = arrays
        return Labelled(ids.tolist(), types.astype(int).tolist(), int(numbers[labels.COLUMN]))


def _mapping(mapped, row=()):
    """Return {text, text_pair and label: column}: those of data.columns, others by their own names."""
    found = {TEXT: TEXT, labels.COLUMN: labels.COLUMN, **(mapped or {})}
    return found if PAIR in found or PAIR not in row else {**found, PAIR: PAIR}


class Pad:
    """Examples -> a batch: input_ids and attention_mask (B, T), and token_type_ids where the model takes them."""

    def __init__(self, tokenizer, takes_types):
        self.tokenizer, self.takes_types = tokenizer, takes_types

    def __call__(self, examples: Sequence[Labelled]):
        """Return {name: tensor}, padded on the right."""
        rows = [
            {"input_ids": one.input_ids} | ({"token_type_ids": one.token_type_ids} if self.takes_types else {})
            for one in examples
        ]
        padded = self.tokenizer.pad(rows, return_tensors="pt", return_attention_mask=True, verbose=False)
        return dict(padded)
