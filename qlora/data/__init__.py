"""Data files -> what the model sees: conversations, token ids, loss masks, and a report of what happened to each row."""

from __future__ import annotations

import collections
import json
import random
from dataclasses import dataclass, field

from ..errors import InputError
from . import chat, formats, sources
from .chat import IGNORE_INDEX, Example
from .packing import Packed, alone, pack

__all__ = [
    "IGNORE_INDEX",
    "Conversation",
    "Example",
    "Packed",
    "Source",
    "alone",
    "copies",
    "encode",
    "hold_out",
    "pack",
    "read",
    "report",
]


@dataclass(frozen=True)
class Conversation:
    """One row: where it stands, and its messages, the last of which is the assistant's."""

    row: sources.Row
    messages: list


@dataclass
class Source:
    """One data file, its conversations, and the count of rows dropped by reason."""

    path: str
    format: str
    conversations: list
    num_read: int
    reasons: collections.Counter = field(default_factory=collections.Counter)


def read(paths, columns=None):
    """Return a Source for each file that `paths` (files, globs, folders) name, every row checked.

    columns: {name of a known shape: the column that holds it}, or None where the rows use the known names.

    Raises:
        InputError: a file is missing or not JSON, or rows are of no known shape; all bad rows of a file together.
    """
    return [_read_one(path, columns) for name in paths for path in sources.expand(name)]


def _read_one(path, columns):
    rows = sources.read_rows(path)
    seen, conversations, problems = collections.Counter(), [], []
    for row in rows:
        try:
            name, messages = formats.to_messages(formats.renamed(row.value, columns))
        except ValueError as error:
            problems.append(f"{row.place}  {error}")
        else:
            seen[name] += 1
            conversations.append(Conversation(row, messages))
    if problems:
        raise InputError.listing(path, problems)
    return Source(path, ", ".join(seen), conversations, len(rows))


def hold_out(source_list, fraction, seed):
    """Return (training conversations, held-out conversations); equal conversations fall on the same side."""
    everything = [conversation for source in source_list for conversation in source.conversations]
    if not fraction:
        return everything, []
    keys = sorted({_key(conversation) for conversation in everything})
    random.Random(seed).shuffle(keys)
    held = set(keys[: max(1, round(len(keys) * fraction))])
    if len(held) == len(keys):
        raise InputError(f"data.eval_fraction {fraction} leaves no training rows of {len(keys)} distinct ones")
    return [c for c in everything if _key(c) not in held], [c for c in everything if _key(c) in held]


def _key(conversation):
    return json.dumps(conversation.messages, sort_keys=True)


def encode(conversations, tokenizer, section, dropped):
    """Return (conversations kept, their Examples) under the recipe section `data`.

    dropped: {path: Counter}; a row over max_length is counted there by reason when `section.overlong` is "drop".

    Raises:
        InputError: rows too long (unless dropped) or refused by the template, all together; or none left.
    """
    kept, examples, refused, overlong = [], [], [], []
    for conversation in conversations:
        where = conversation.row.where
        try:
            example = chat.encode(tokenizer, conversation.messages, section.train_on)
        except ValueError as error:
            refused.append(f"{where}  {error}")
            continue
        length = len(example.input_ids)
        if length <= section.max_length:
            kept.append(conversation)
            examples.append(example)
        elif section.overlong == "drop":
            dropped[conversation.row.path][f"longer than max_length {section.max_length}"] += 1
        else:
            overlong.append(f"{where}  {length} tokens, data.max_length is {section.max_length}")
    if refused:
        raise InputError.listing("the data", refused, "mend these rows, or give another data.chat_template")
    if overlong:
        raise InputError.listing(
            "the data", overlong, "raise data.max_length, or set data.overlong=drop to leave them out"
        )
    if not examples:
        raise InputError(f"no row is left to train on: all are longer than data.max_length {section.max_length}")
    return kept, examples


def report(source_list, examples, dropped, stops, rows_per_step, packed=None, max_length=None):
    """Return the contents of data_report.json for the training `examples`.

    stops: ids that generation stops at. rows_per_step: rows an optimizer step takes. packed: the rows of max_length that
    the examples were packed into, if they were.
    """
    lengths = sorted(len(example.input_ids) for example in examples)
    total, trained = sum(lengths), sum(example.num_trained for example in examples)
    ends = sum(_last_trained(example) in stops for example in examples)
    return {
        "sources": [
            {
                "path": source.path,
                "format": source.format,
                "rows_read": source.num_read,
                "rows_kept": source.num_read - sum(dropped[source.path].values()),
                "rows_dropped": sum(dropped[source.path].values()),
                "rows_truncated": 0,
                "reasons": dict(dropped[source.path]),
            }
            for source in source_list
        ],
        "rows": len(examples),
        "tokens": {"total": total, "trained": trained},
        "length": {"p50": lengths[len(lengths) // 2], "p95": lengths[int(len(lengths) * 0.95)], "max": lengths[-1]},
        "ends_with_stop_token": ends / len(examples),
        "packing_efficiency": total / (len(packed) * max_length) if packed else None,
        "steps_per_epoch": -(-len(packed or examples) // rows_per_step),
    }


def copies(conversations, held_out):
    """Return {"duplicates": training rows that repeat another, "eval_rows_in_training": held-out rows trained on}."""
    keys = collections.Counter(_key(conversation) for conversation in conversations)
    return {
        "duplicates": len(conversations) - len(keys),
        "eval_rows_in_training": sum(_key(conversation) in keys for conversation in held_out),
    }


def _last_trained(example):
    return next((label for label in reversed(example.labels) if label != IGNORE_INDEX), None)
