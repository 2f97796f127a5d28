"""What one message of a conversation may be: its role, words, thoughts and tool calls, under whatever names a row has them."""

from __future__ import annotations

import json
import re

from .strict_json import loads

_ROLE_NAMES = {  # of OpenAI, older and newer, and of ShareGPT
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_FLAGS = ("train", "weight", "loss_weight")
_KNOWN = {
    "role",
    "content",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
    "reasoning_content",
    *_FLAGS,
}
_PARTS = ("reasoning", "tool_call", "text")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read(message, at):
    """Return (the message with the keys that chat templates read, whether the row says that it is trained, or None).

    at: the place of the message, for what is wrong with it.

    Raises:
        ValueError: what is wrong with it, and what is allowed.
    """
    message = plain_keys(message, at)
    return _cleaned(message, at), _flag(message, at)


def is_message(value):
    """Return whether `value` is meant as a message: an object with a known role, and content."""
    role = value.get("role") if isinstance(value, dict) else None
    return isinstance(role, str) and role in _ROLE_NAMES and "content" in value


def plain_keys(message, at):
    """Return the message with `role` and `content`, whatever it calls them, parts of its content in the keys they mean."""
    message = {key: inner for key, inner in message.items() if not is_empty(inner) or key in ("content", "value")}
    for other, ours in (("from", "role"), ("value", "content")):
        if other in message:
            if message.get(ours, message[other]) != message[other]:
                raise ValueError(f"{at} has both {ours} and {other}, which differ; keep one of them")
            message[ours] = message.pop(other)
    unknown = {str(key) for key in message} - _KNOWN
    if unknown:
        raise ValueError(
            f"{at} has {', '.join(sorted(unknown))}: unknown key, which may change the conversation; if it is only a label, "
            f"list it in data.ignore_keys: [{', '.join(sorted(unknown))}]"
        )
    if message.get("role") == "function_call":
        return {**message, "role": "assistant", "content": "", "tool_calls": _calls(message.get("content"), at)}
    return _without_parts(message, at) if isinstance(message.get("content"), list) and message["content"] else message


def _without_parts(message, at):
    """Return the message with its text joined by line ends, as servers do for templates that take strings; its parts of
    reasoning and tool calls in the keys of their own."""
    texts, thoughts, calls = [], [], []
    for index, part in enumerate(message["content"]):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if kind == "reasoning" and isinstance(text, str) and not texts and not calls:
            thoughts.append(text)
        elif kind == "tool_call" and isinstance(text, str):
            calls += _calls(text, f"{at}.content[{index}]")
        elif kind == "text" and isinstance(text, str) and not calls:
            texts.append(text)
        else:
            expected = (
                "reasoning, text and tool_call parts in this order" if kind in _PARTS else "only text is supported"
            )
            found = kind if isinstance(part, dict) else part
            raise ValueError(f'{at}.content[{index}] is {found!r}, not {{"type": "text", "text"}}: {expected}')
    clash = [key for key, found in (("reasoning_content", thoughts), ("tool_calls", calls)) if found and key in message]
    if clash:
        raise ValueError(f"{at} has {clash[0]} both as a key and as parts of its content; keep one of them")
    message = {**message, "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return {**message, "tool_calls": calls} if calls else message


def _calls(text, at):
    """Return the tool calls that stand in `text`: a JSON object with name and arguments, or a list of them."""
    try:
        calls = loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{at}.value is not a JSON function call: {error}") from None
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _cleaned(message, at):
    """Return the message with the keys that chat templates read, tool calls in the one form that they expect."""
    role = message.get("role")
    role = _ROLE_NAMES.get(role) if isinstance(role, str) else None
    if role is None:
        raise ValueError(f"{at}.role is {message.get('role')!r}, not one of {', '.join(_ROLE_NAMES)}")
    calls = message.get("tool_calls") or (
        [{"function": message["function_call"]}] if message.get("function_call") else []
    )
    if calls and role != "assistant":
        raise ValueError(f"{at}.tool_calls: only the assistant calls tools")
    content = "" if calls and message.get("content") is None else _text_of(message.get("content"), at)
    if not content.strip() and role not in ("system", "tool") and not calls:
        raise ValueError(f"{at}.content is empty")
    cleaned = {"role": role, "content": content}
    if calls:
        if not isinstance(calls, list):
            raise ValueError(f"{at}.tool_calls is {kind_of(calls)}, not a list")
        cleaned["tool_calls"] = [_call(call, f"{at}.tool_calls[{index}]") for index, call in enumerate(calls)]
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            if not isinstance(message[key], str):
                raise ValueError(f"{at}.{key} is {kind_of(message[key])}, not a string")
            cleaned[key] = message[key]
    for key in ("content", "reasoning_content", "name", "tool_call_id"):
        refuse_surrogates(f"{at}.{key}", cleaned.get(key, ""))
    return cleaned


def _text_of(content, at):
    if not isinstance(content, str):
        raise ValueError(f"{at}.content is {kind_of(content)}, not a string")
    return content


def _call(call, at):
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f'{at} is not {{"function": {{"name", "arguments"}}}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's form; templates write the JSON themselves
        try:
            arguments = loads(arguments or "{}")
        except ValueError as error:
            raise ValueError(f"{at}.arguments is not valid JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"{at}.arguments is {kind_of(arguments)}, not an object")
    refuse_no_json(f"{at}.arguments", [function["name"], arguments])
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _flag(message, at):
    """Return whether the row itself says that this message is trained (`train`, or a weight of 0 or 1), or None."""
    said = {key: message[key] for key in flag_keys(message)}
    for key, value in said.items():
        if key == "train" and not isinstance(value, bool):
            raise ValueError(f"{at}.train is {value!r}, not one of True, False")
        if key != "train" and (isinstance(value, bool) or not isinstance(value, (int, float)) or value not in (0, 1)):
            raise ValueError(f"{at}.{key} is {value!r}, not 0 or 1: a message is trained or it is not; set one of them")
    if len(set(map(bool, said.values()))) > 1:
        raise ValueError(f"{at}: {' and '.join(said)} disagree; keep one of them")
    return bool(next(iter(said.values()))) if said else None


def flag_keys(message):
    """Return the keys with which a message says whether it is trained."""
    return [key for key in _FLAGS if message.get(key) is not None]


def refuse_no_json(at, value):
    """Raise ValueError where a template could not write `value` as JSON: Parquet files hold dates, bytes and infinities."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{at} cannot be written as JSON: {error}") from None
    refuse_surrogates(at, text)


def refuse_surrogates(at, text):
    """Raise ValueError where `text` is none: a broken escape, or bytes from a terminal that are not UTF-8."""
    if _SURROGATE.search(text):
        raise ValueError(f"{at} has half of a surrogate pair (broken \\u escape, or not UTF-8)")


def is_empty(value):
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def kind_of(value):
    if value is None or isinstance(value, (dict, str)):
        return "null" if value is None else "an object" if isinstance(value, dict) else "a string"
    return repr(value) if not isinstance(value, list) else "a list" if value else "an empty list"
