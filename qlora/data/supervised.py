"""Rows -> conversations -> Examples: one sequence of token ids each, and which of them are trained."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from . import columns, length, sources, tokens, words
from .encoder import Encoded, Settings
from .masked_examples import IGNORE_INDEX, Example, encode


class Supervised:
    """The Encoder of supervised training."""

    ARRAYS: ClassVar = {"tokens": "<i4", "trained": "?"}
    NUMBERS: ClassVar = {"trained": "<i4", "last": "<i4"}  # how many tokens are trained; the last of them, or -1
    LENGTH = None
    COUNTS = (
        "rows_truncated",
        "rows_split",
        *tokens.OF_CONVERSATIONS,
        "conversations_by_answer",  # became a training row an answer
        "answers_by_answer",
        "tokens_by_answer",  # of all these rows
        "tokens_of_conversations",  # of the longest of each conversation
    )

    open_source, not_read = staticmethod(sources.open_source), staticmethod(sources.not_read)
    refuse_columns, refuse_table = staticmethod(columns.refuse_bad), staticmethod(columns.refuse_table)

    def __init__(self, tokenizer, settings: Settings):
        self.tokenizer, self.settings = tokenizer, settings

    def identity(self):
        return tokens.identity(self.tokenizer)

    def read(self, value):
        """Return (format name, Conversation) of a row; raises ValueError for what is wrong with it."""
        settings = self.settings
        name, conversation = columns.read(value, settings.columns, settings.format, settings.ignore_keys)
        return name, without_thoughts(conversation) if settings.thoughts == "drop" else conversation

    def encode(self, value):
        tokenizer, settings, masks = self.tokenizer, self.settings, self.settings.thoughts == "mask"
        name, conversation = self.read(value)
        whole = encode(tokenizer, conversation, settings.train_on, masks)
        fitted = length.fit(
            tokenizer, conversation, whole, settings.train_on, settings.max_length, settings.overlong, masks
        )
        counts = {
            "rows_truncated": int(fitted.cut),
            "rows_split": int(fitted.split),
            **tokens.counts_of(tokenizer, conversation),
        }
        if len(whole) > 1:
            lengths = [len(example.input_ids) for example in whole]
            counts |= {"conversations_by_answer": 1, "answers_by_answer": len(lengths)}
            counts |= {"tokens_by_answer": sum(lengths), "tokens_of_conversations": max(lengths)}
        unused = {*conversation.unused, *frozenset().union(*(example.left_out for example in whole))}
        return Encoded(name, conversation.key(), fitted.examples, unused, counts)

    def stored(self, example):
        trained = [label != IGNORE_INDEX for label in example.labels]
        last = next((label for label in reversed(example.labels) if label != IGNORE_INDEX), -1)
        return (example.input_ids, trained), (sum(trained), last)

    def restored(self, arrays, numbers):
        ids, trained = arrays
        return Example(ids.tolist(), np.where(trained, ids, IGNORE_INDEX).tolist())


def without_thoughts(conversation):
    """Return the conversation without the thoughts of its answers."""
    messages = words.without_thoughts(conversation.messages)
    dropped = messages != conversation.messages
    return dataclasses.replace(conversation, messages=messages, dropped_thoughts=dropped)
