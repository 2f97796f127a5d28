"""{"text"}: no conversation; every token is trained."""

from __future__ import annotations

from ..conversation import Conversation
from ..message import kind_of, refuse_surrogates

KEYS = ("text",)
USED = KEYS
LISTS = ()


def read(row, ignore):
    text = row.get("text")
    if not isinstance(text, str):
        raise ValueError(f"text is {kind_of(text)}, not a string")
    if not text.strip():
        raise ValueError("text is empty")
    refuse_surrogates("text", text)
    return Conversation([], text=text), set()
