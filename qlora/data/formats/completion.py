"""{"prompt", "completion"}: strings or lists of messages.

A pair of strings becomes one user and one assistant turn, so that training, `chat` and every server that applies the model's
chat template see the same string.
"""

from __future__ import annotations

import contextlib

from ..conversation import CONTEXT, converse
from ..message import is_message
from ..strict_json import loads

KEYS = ("prompt", "completion")
USED = (*KEYS, *CONTEXT)
LISTS = ()


def read(row, ignore):
    prompt, completion = messages_in(row.get("prompt")), messages_in(row.get("completion"))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise ValueError("prompt and completion are strings or lists of messages")
    return converse(prompt + completion, "prompt + completion", row, ignore, completion=len(prompt))


def messages_in(value):
    """Return the messages that the string `value` is as JSON, as in a cell of a CSV file; or `value`."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        with contextlib.suppress(ValueError):
            found = loads(value)
            if all(map(is_message, found)):
                return found
    return value
