"""{"conversations": [{"from", "value"}, ...]}: messages under ShareGPT's names."""

from __future__ import annotations

from ..conversation import CONTEXT, converse

KEYS = ("conversations",)
USED = (*KEYS, *(key for key in CONTEXT if key != "history"))
LISTS = ("conversations",)


def read(row, ignore):
    return converse(row.get("conversations"), "conversations", row, ignore)
