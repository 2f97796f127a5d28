"""What one row says, as messages: which may follow which, what stands beside them, and what the row says of training them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

from .message import flag_keys, is_empty, kind_of, plain_keys, refuse_no_json
from .message import read as read_message
from .strict_json import loads

CONTEXT = ("system", "history", "tools", "functions")  # what a row may hold beside its messages


@dataclass(frozen=True)
class Conversation:
    """What one row says.

    messages: {"role", "content", ...} of the roles system, user, assistant and tool, ending with the assistant; empty for
    a row of plain `text`. tools: JSON schemas. flags: {index of an assistant message: trained or not}, where the row says
    so itself; untrained_by: the keys in which it says no. completion: index at which the row's completion begins, where it
    has one. unused: keys of the row that are not in the conversation. merged: whether messages of the assistant were merged.
    nulls: how many nulls were removed from tool calls and tools. dropped_thoughts: whether thoughts were.
    """

    messages: list
    tools: list | None = None
    flags: tuple = ()
    untrained_by: tuple = field(default=(), compare=False, kw_only=True)
    completion: int | None = None
    text: str | None = None
    unused: tuple = field(default=(), compare=False)
    merged: bool = field(default=False, compare=False)
    nulls: int = field(default=0, compare=False)
    dropped_thoughts: bool = field(default=False, compare=False)

    @property
    def untrained(self):
        """What the row has where it says that a message is not trained, in words."""
        return " or ".join(f"{key}: {'false' if key == 'train' else 0}" for key in self.untrained_by)

    def key(self):
        """Return 8 bytes that are equal for conversations that say the same, as an unsigned number."""
        said = json.dumps([self.messages, self.tools, self.text], sort_keys=True)
        return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")


def converse(messages, name, row, ignore, completion=None):
    """Return (the Conversation of `messages` and of what else the `row` says, those keys of `ignore` that messages have).

    name: what the row calls its messages. completion: index of the first message of the row's completion, where it has one.

    Raises:
        ValueError: what is wrong with the messages and what is allowed, without file and line.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} is {kind_of(messages)}, not a list of messages")
    before = len(messages)
    if completion is not None and not 0 < completion < before:
        raise ValueError("prompt and completion must both have a message")
    messages = _with_context(messages, row)
    added = len(messages) - before  # `at` counts as the row does
    turns, ignored, keys, merged, begins = [], set(), {}, 0, None
    for index, message in enumerate(messages):
        at = f"{name}[{index - added}]" if index >= added else f"system or history, message {index}"
        if not isinstance(message, dict):
            raise ValueError(f'{at} is {kind_of(message)}, not {{"role", "content"}}')
        ignored |= {key for key in ignore if not is_empty(message.get(key))}
        message = {key: inner for key, inner in message.items() if key not in ignore}
        turn, flag = read_message(message, at)
        if flag and turn["role"] != "assistant":
            raise ValueError(
                f"{at}.{flag_keys(message)[0]}: only the assistant's messages can be trained on one by one"
            )
        if turn["role"] == "system" and index != 0:
            raise ValueError(f"{at}: a system message can only come first")
        if completion is not None and index == completion + added:
            begins = len(turns)
        if turn["role"] == "assistant":
            keys |= {key: keys.get(key) or flag is False for key in flag_keys(message)}
        if turn["role"] == "assistant" and turns and turns[-1][0]["role"] == "assistant":
            if begins == len(turns):
                raise ValueError(
                    f"{at}: the prompt ends with the assistant; end it with the message that the assistant answers"
                )
            turns[-1] = (_merged(turns[-1], (turn, flag), at, keys), flag)
            merged += 1
        else:
            turns.append((turn, flag))
    last = turns[-1][0]["role"]
    if last != "assistant":
        raise ValueError(f"{name} ends with the {last}; the last message is the answer to learn")
    flags = tuple(
        (index, flag) for index, (turn, flag) in enumerate(turns) if flag is not None and turn["role"] == "assistant"
    )
    messages, untrained = [turn for turn, _ in turns], tuple(key for key, leaves_out in keys.items() if leaves_out)
    return Conversation(messages, _tools(row), flags, begins, merged=merged > 0, untrained_by=untrained), ignored


def _merged(before, after, at, keys):
    """Return the one turn that chat makes of two messages of the assistant: its words, then its calls."""
    (first, first_flag), (second, second_flag) = before, after
    if not second.get("tool_calls") or second["content"].strip():
        raise ValueError(
            f"{at}: two assistant messages in a row, which a chat cannot produce; join them, or put the user's message "
            "or the tool's result between them"
        )
    if first_flag != second_flag or second.get("reasoning_content"):
        what = " or ".join(keys) if first_flag != second_flag else "reasoning_content"
        raise ValueError(f"{at}: is one turn with the message before it, but has another {what}; join them yourself")
    return {**first, "tool_calls": [*first.get("tool_calls", []), *second["tool_calls"]]}


def _with_context(messages, row):
    """Return `messages` with the row's own `system` and `history` before them."""
    first = messages[:1] if isinstance(messages[0], dict) and _named(messages[0]) in ("system", "developer") else []
    messages = first + _history(row.get("history")) + messages[len(first) :]
    system = row.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise ValueError(f"system is {kind_of(system)}, not a string")
    if not first:
        return [{"role": "system", "content": system}, *messages]
    said = {"content": first[0].get("content", first[0].get("value"))}
    if plain_keys(said, "system").get("content") != system:
        raise ValueError("system differs from the system message; keep one of them")
    return messages


def _history(turns):
    """Return the messages of `history`, a list of [user, assistant] pairs."""
    if not turns:
        return []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise ValueError("history is not a list of [user, assistant] pairs")
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def _named(message):
    return message.get("role", message.get("from"))


def _tools(row):
    """Return the row's tools as JSON schemas {"type": "function", "function": {...}}, or None where it has none."""
    tools = row.get("tools") or row.get("functions")
    if row.get("functions") not in (None, [], "", tools):
        raise ValueError("tools and functions differ; keep one of them")
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = loads(tools)
        except ValueError as error:
            raise ValueError(f"tools is a string, but not valid JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"tools is {kind_of(tools)}, not a list of functions")
    wrapped = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'tools[{index}] is not a function with a "name"')
        refuse_no_json(f"tools[{index}]", tool)
        wrapped.append({"type": "function", **tool} if function is not tool else {"type": "function", "function": tool})
    return wrapped
