"""{"instruction", "input"?, "output"}: a question, what it is about, and the answer."""

from __future__ import annotations

from ..conversation import CONTEXT, converse
from ..message import kind_of

KEYS = ("instruction", "output")
USED = ("instruction", "input", "output", *CONTEXT)
LISTS = ()


def read(row, ignore):
    for key in ("instruction", "input", "output"):
        if not isinstance(row.get(key), str) and (key in KEYS or row.get(key) is not None):
            raise ValueError(f"{key} is {kind_of(row.get(key))}, not a string")
    parts = [row["instruction"], row.get("input")]
    messages = [
        {"role": "user", "content": "\n\n".join(part for part in parts if part)},
        {"role": "assistant", "content": row["output"]},
    ]
    return converse(messages, "instruction + output", row, ignore)
