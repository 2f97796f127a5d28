"""{"messages": [{"role", "content", "tool_calls"?, "train"?}, ...]}, as of OpenAI."""

from __future__ import annotations

from ..conversation import CONTEXT, converse

KEYS = ("messages",)
USED = (*KEYS, *(key for key in CONTEXT if key != "history"))
LISTS = ("messages",)


def read(row, ignore):
    return converse(row.get("messages"), "messages", row, ignore)
