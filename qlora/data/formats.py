"""One row of any known shape -> its conversation. The shape is read off the row's own keys.

    messages     {"messages": [{"role", "content", "tool_calls"?, "train"?}, ...], "tools"?}
    alpaca       {"instruction", "input"?, "output", "system"?, "history"?: [[user, assistant], ...]}
    completion   {"prompt", "completion"}, strings or lists of messages, "tools"?
    sharegpt     {"conversations": [{"from", "value"}, ...], "system"?, "tools"?}
    text         {"text"}: no conversation; every token is trained

A `prompt`/`completion` pair of strings becomes one user and one assistant turn, so that training, `chat` and every
server that applies the model's chat template see the same string.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache

from ..errors import InputError
from .sources import loads

FORMATS = ("messages", "alpaca", "completion", "sharegpt", "text")
SHAPES = '"messages", "instruction" + "output", "prompt" + "completion", "conversations", or "text"'
ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {"developer": "system", "function": "tool"}  # OpenAI's newer and older names
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "observation": "tool",
    "tool": "tool",
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_KNOWN = {
    "role",
    "content",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
    "reasoning_content",
    "train",
    "weight",
}
# other unknown keys of a row (id, source, ...) are labels; these would change what the model sees
_CHANGES_THE_PROMPT = ("images", "image", "audio", "audios", "videos", "documents")


@dataclass(frozen=True)
class Conversation:
    """What one row says.

    messages: {"role", "content", ...} of the roles system, user, assistant and tool, ending with the assistant; empty for
    a row of plain `text`. tools: JSON schemas. flags: {index of an assistant message: trained or not}, where the row says
    so itself. completion: index at which the row's completion begins, where it has one.
    """

    messages: list
    tools: list | None = None
    flags: tuple = ()
    completion: int | None = None
    text: str | None = None

    def key(self):
        """Return 8 bytes that are equal for conversations that say the same, as an unsigned number."""
        said = json.dumps([self.messages, self.tools, self.text], sort_keys=True)
        return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")


def renamed(value, columns):
    """Return the row with only the fields that `columns` ({known name: column, or a Jinja template of columns}) names.

    Raises:
        ValueError: the row has no such column, or the template fails on it.
    """
    if not columns:
        return value
    if not isinstance(value, dict):
        raise ValueError(f"data.columns needs rows with columns, this is {_kind(value)}")
    missing = [column for column in columns.values() if not is_template(column) and column not in value]
    if missing:
        raise ValueError(f"has no column {', '.join(map(repr, missing))}; it has {', '.join(map(str, value))}")
    return {
        name: _fill(column, value) if is_template(column) else _text(name, value[column])
        for name, column in columns.items()
    }


def is_template(column):
    return "{{" in column or "{%" in column


def _text(name, value):
    """A label of 0 or 1 is a fine answer; what the known shape wants as a list stays one."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (
        str(value) if number and name in ("prompt", "completion", "instruction", "input", "output", "text") else value
    )


@cache
def compiled(column):
    """Return the Jinja template `column`; raises jinja2.TemplateError if it is none."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(column)


def refuse_bad_templates(columns):
    """Raise InputError if a value of `columns` is meant as a Jinja template, and is none."""
    import jinja2

    for name, column in columns.items():
        try:
            compiled(column) if is_template(column) else None
        except jinja2.TemplateError as error:
            raise InputError(f"data.columns.{name}: {column!r} is no Jinja template: {error}") from None


def _fill(column, value):
    import jinja2

    try:
        return compiled(column).render(value)
    except (jinja2.TemplateError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"the template {column!r} of data.columns fails: {error}") from None


def to_conversation(value, only="auto"):
    """Return (format name, Conversation) of a row. only: the one format that is expected; "auto" takes any.

    Raises:
        ValueError: what is wrong with the row and what is allowed, without file and line.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a row is an object with {SHAPES}, not {_kind(value)}")
    meant = [key for key in _CHANGES_THE_PROMPT if value.get(key)]
    if meant:
        raise ValueError(f"{', '.join(meant)}: not supported, and leaving it out would train on another conversation")
    name = _detect(value)
    if only not in ("auto", name):
        raise ValueError(f"is of format {name}, the recipe says format: {only}")
    return name, _READERS[name](value)


def _detect(value):
    for name, keys in _KEYS.items():
        if all(key in value for key in keys):
            return name
    raise ValueError(f"keys {', '.join(map(str, value)) or 'none'} fit no known shape; give {SHAPES}, or data.columns")


def _messages(value):
    return _checked(value["messages"], "messages", _tools(value))


def _completion(value):
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise ValueError("prompt and completion are strings or lists of messages")
    return _checked(prompt + completion, "prompt + completion", _tools(value), completion=len(prompt))


def _sharegpt(value):
    turns = value["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('conversations is not a list of {"from", "value"}')
    messages = []
    for index, turn in enumerate(turns):
        named = turn.get("from")
        role = _SHAREGPT_ROLES.get(named) if isinstance(named, str) else None
        if role is None:
            raise ValueError(f"conversations[{index}].from is {named!r}, not one of {', '.join(_SHAREGPT_ROLES)}")
        flags = {key: turn[key] for key in ("train", "weight") if key in turn}
        if role == "call":
            messages.append(
                {"role": "assistant", "content": "", "tool_calls": _calls(turn.get("value"), index), **flags}
            )
        else:
            messages.append({"role": role, "content": turn.get("value"), **flags})
    if value.get("system"):
        messages.insert(0, {"role": "system", "content": value["system"]})
    return _checked(messages, "conversations", _tools(value))


def _calls(text, index):
    """Return the tool calls of a ShareGPT function_call: a JSON object with name and arguments, or a list of them."""
    try:
        calls = loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"conversations[{index}].value is no JSON of a function call: {error}") from None
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _alpaca(value):
    for key in ("instruction", "input", "output", "system"):
        required = key in ("instruction", "output")
        if not isinstance(value.get(key), str) and (required or value.get(key) is not None):
            raise ValueError(f"{key} is {_kind(value[key])}, not a string")
    parts = [value["instruction"], value.get("input")]
    messages = [
        {"role": "user", "content": "\n\n".join(part for part in parts if part)},
        {"role": "assistant", "content": value["output"]},
    ]
    messages = _history(value.get("history")) + messages
    if value.get("system"):
        messages.insert(0, {"role": "system", "content": value["system"]})
    return _checked(messages, "instruction + output")


def _history(turns):
    """Return the messages of Alpaca's `history`, a list of [user, assistant] pairs."""
    if turns is None:
        return []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise ValueError("history is not a list of [user, assistant] pairs")
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def _plain_text(value):
    text = value["text"]
    if not isinstance(text, str):
        raise ValueError(f"text is {_kind(text)}, not a string")
    if not text.strip():
        raise ValueError("text is empty")
    refuse_surrogates("text", text)
    return Conversation([], text=text)


_KEYS = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
_READERS = {
    "messages": _messages,
    "alpaca": _alpaca,
    "completion": _completion,
    "sharegpt": _sharegpt,
    "text": _plain_text,
}


def _tools(value):
    """Return the row's tools as JSON schemas {"type": "function", "function": {...}}, or None where it has none."""
    tools = value.get("tools") or value.get("functions")
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = loads(tools)
        except ValueError as error:
            raise ValueError(f"tools is a string, but no JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"tools is {_kind(tools)}, not a list of functions")
    wrapped = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'tools[{index}] is no function with a "name"')
        _refuse_no_json(f"tools[{index}]", tool)
        wrapped.append({"type": "function", **tool} if function is not tool else {"type": "function", "function": tool})
    return wrapped


def _checked(messages, name, tools=None, completion=None):
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} is {_kind(messages)}, not a list of messages")
    cleaned, flags = [], {}
    for index, message in enumerate(messages):
        at = f"{name}[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f'{at} is {_kind(message)}, not {{"role", "content"}}')
        unknown = {str(key) for key, value in message.items() if value is not None} - _KNOWN
        if unknown:
            raise ValueError(f"{at} has {', '.join(sorted(unknown))}: not understood, and it might change what is said")
        cleaned.append(_message(message, at))
        flag = _flag(message, at)
        if flag is not None and cleaned[-1]["role"] == "assistant":
            flags[index] = flag
        elif flag:
            raise ValueError(f"{at}.train: only the assistant's messages can be trained on one by one")
        if cleaned[-1]["role"] == "system" and index != 0:
            raise ValueError(f"{at}: a system message can only come first")
    if cleaned[-1]["role"] != "assistant":
        raise ValueError(f"{name} ends with the {cleaned[-1]['role']}; the last message is the answer to learn")
    if completion is not None and not 0 < completion < len(cleaned):
        raise ValueError("prompt and completion must both have a message")
    return Conversation(cleaned, tools, tuple(flags.items()), completion)


def _message(message, at):
    """Return the message with the keys that chat templates read, tool calls in the one form that they expect."""
    role = message.get("role")
    role = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{at}.role is {message.get('role')!r}, not one of {', '.join(ROLES)}")
    calls = message.get("tool_calls") or (
        [{"function": message["function_call"]}] if message.get("function_call") else []
    )
    if calls and role != "assistant":
        raise ValueError(f"{at}.tool_calls: only the assistant calls tools")
    content = "" if calls and message.get("content") is None else _joined(message.get("content"), at)
    if not content.strip() and role not in ("system", "tool") and not calls:
        raise ValueError(f"{at}.content is empty")
    cleaned = {"role": role, "content": content}
    if calls:
        if not isinstance(calls, list):
            raise ValueError(f"{at}.tool_calls is {_kind(calls)}, not a list")
        cleaned["tool_calls"] = [_call(call, f"{at}.tool_calls[{index}]") for index, call in enumerate(calls)]
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            if not isinstance(message[key], str):
                raise ValueError(f"{at}.{key} is {_kind(message[key])}, not a string")
            cleaned[key] = message[key]
    for key in ("content", "reasoning_content", "name", "tool_call_id"):
        refuse_surrogates(f"{at}.{key}", cleaned.get(key, ""))
    return cleaned


def _joined(content, at):
    """Return a message's text; parts are joined by a line end, as servers do for templates that take strings."""
    if isinstance(content, list) and content:
        for index, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(
                    f'{at}.content[{index}] is {kind!r}, not {{"type": "text", "text"}}: only text is supported'
                )
        return "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{at}.content is {_kind(content)}, not a string")
    return content


def _call(call, at):
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f'{at} is no {{"function": {{"name", "arguments"}}}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's form; templates write the JSON themselves
        try:
            arguments = loads(arguments or "{}")
        except ValueError as error:
            raise ValueError(f"{at}.arguments is no JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"{at}.arguments is {_kind(arguments)}, not an object")
    _refuse_no_json(f"{at}.arguments", [function["name"], arguments])
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _flag(message, at):
    """Return whether the row itself says that this message is trained (`train`, or OpenAI's `weight`), or None."""
    for key, kind, allowed in (("train", bool, (True, False)), ("weight", int, (0, 1))):
        if message.get(key) is not None:
            if type(message[key]) is not kind or message[key] not in allowed:
                raise ValueError(f"{at}.{key} is {message[key]!r}, not one of {', '.join(map(str, allowed))}")
            return bool(message[key])
    return None


def _refuse_no_json(at, value):
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


def _kind(value):
    if value is None or isinstance(value, (dict, str)):
        return "null" if value is None else "an object" if isinstance(value, dict) else "a string"
    return repr(value) if not isinstance(value, list) else "a list" if value else "an empty list"
