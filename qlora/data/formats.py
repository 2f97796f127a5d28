"""One row of any known shape -> its conversation. The shape is read off the row's own keys.

    messages     {"messages": [{"role", "content", "tool_calls"?, "train"?}, ...]}
    alpaca       {"instruction", "input"?, "output"}
    completion   {"prompt", "completion"}, strings or lists of messages
    sharegpt     {"conversations": [{"from", "value"}, ...]}
    text         {"text"}: no conversation; every token is trained

All but text may have "system" and "tools"; alpaca and completion "history" too. What else a row holds is a label: it is
counted as unused, or the row is refused where it says that the answer is not to be learned.

A `prompt`/`completion` pair of strings becomes one user and one assistant turn, so that training, `chat` and every
server that applies the model's chat template see the same string.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from functools import cache

from ..system.errors import InputError
from .sources import loads

FORMATS = ("messages", "alpaca", "completion", "sharegpt", "text")
SHAPES = '"messages", "instruction" + "output", "prompt" + "completion", "conversations", or "text"'
ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {  # of OpenAI, older and newer, and of ShareGPT
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
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
    "loss_weight",
}
_OPTIONAL = ("system", "history", "tools", "input")  # a row may lack these, whatever data.columns maps
_PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages")
_DESIRABLE = ("label", "kto_tag")
# other unknown keys of a row (id, source, ...) are labels; these would change what the model sees
_CHANGES_THE_PROMPT = ("images", "image", "audio", "audios", "videos", "documents")


@dataclass(frozen=True)
class Conversation:
    """What one row says.

    messages: {"role", "content", ...} of the roles system, user, assistant and tool, ending with the assistant; empty for
    a row of plain `text`. tools: JSON schemas. flags: {index of an assistant message: trained or not}, where the row says
    so itself. completion: index at which the row's completion begins, where it has one. unused: keys of the row that are
    not in the conversation. merged: whether messages of the assistant were merged. nulls: how many nulls were removed from
    tool calls and tools. dropped_thoughts: whether thoughts were.
    """

    messages: list
    tools: list | None = None
    flags: tuple = ()
    completion: int | None = None
    text: str | None = None
    unused: tuple = field(default=(), compare=False)
    merged: bool = field(default=False, compare=False)
    nulls: int = field(default=0, compare=False)
    dropped_thoughts: bool = field(default=False, compare=False)

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
    missing = [
        column
        for name, column in columns.items()
        if name not in _OPTIONAL and not is_template(column) and column not in value
    ]
    if missing:
        raise ValueError(f"has no column {', '.join(map(repr, missing))}; it has {', '.join(map(str, value))}")
    return {
        name: _fill(column, value) if is_template(column) else _text(name, value[column])
        for name, column in columns.items()
        if is_template(column) or column in value
    }


def optional_columns(columns):
    """Return the columns that a row may lack; one that every row of a file lacks is a mistake in the recipe."""
    return {column for name, column in (columns or {}).items() if name in _OPTIONAL and not is_template(column)}


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


@cache
def _mentioned(column):
    """Return the names of the columns that the value `column` of data.columns reads."""
    from jinja2 import Environment, meta

    return meta.find_undeclared_variables(Environment().parse(column)) if is_template(column) else {column}


def refuse_bad_columns(columns):
    """Raise InputError if a value of `columns` is meant as a Jinja template, and is none, or if no shape has use for all
    that is mapped."""
    import jinja2

    for name, column in columns.items():
        try:
            compiled(column) if is_template(column) else None
        except jinja2.TemplateError as error:
            raise InputError(f"data.columns.{name}: {column!r} is not a Jinja template: {error}") from None
    if not columns:
        return
    try:
        shape = _detect(columns)
    except ValueError:
        raise InputError(f"data.columns maps {', '.join(columns)}: not enough for a row; map {SHAPES}") from None
    useless = [name for name in columns if name not in _USED[shape]]
    if useless:
        raise InputError(
            f"data.columns.{useless[0]}: rows of format {shape} do not use {', '.join(useless)}; "
            f"they take {', '.join(_USED[shape])}"
        )


def refuse_table(path, header, columns, ignore):
    """Raise InputError if the table's columns, `header`, lack what data.columns names, or fit no shape."""
    named = set().union(*(_mentioned(column) for column in (columns or {}).values() if _is_needed(column)))
    missing = sorted(named.difference(header))
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(map(repr, missing))}, which data.columns names; it has {', '.join(header)}"
        )
    if not columns:
        try:
            _detect([name for name in header if name not in ignore], "columns")
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None


def _is_needed(column):
    """False for a template that says what it does without a column."""
    return not (is_template(column) and re.search(r"\bdefined\b|\bdefault\b", column))


def _fill(column, value):
    import jinja2

    try:
        return compiled(column).render(value)
    except (jinja2.TemplateError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"the template {column!r} of data.columns fails: {error}") from None


def read(value, columns=None, only="auto", ignore=()):
    """Return (format name, Conversation) of a row as it stands in a file.

    columns, only: the recipe's data.columns and format. ignore: keys, of the row or of a message, that are not used.

    Raises:
        ValueError: what is wrong with the row and what is allowed, without file and line.
    """
    if not columns or not isinstance(value, dict):
        return to_conversation(renamed(value, columns), only, ignore)
    mapped = set().union(*map(_mentioned, columns.values()))
    rest = {key: inner for key, inner in value.items() if key not in mapped}
    name, conversation = to_conversation(renamed(value, columns), only, ignore)
    # who maps `chosen` means to train on it
    _refuse_other_objectives(rest, name, () if mapped & {*_PREFERENCE} else _PREFERENCE, ignore)
    unused = {*conversation.unused, *(key for key, inner in rest.items() if not _is_empty(inner))}
    return name, replace(conversation, unused=tuple(sorted(unused)))


def to_conversation(value, only="auto", ignore=()):
    """Return (format name, Conversation) of a row. only: the one format that is expected; "auto" takes any. ignore: keys
    that are not used.

    Raises:
        ValueError: what is wrong with the row and what is allowed, without file and line.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a row is an object with {SHAPES}, not {_kind(value)}")
    row = {key: inner for key, inner in value.items() if key not in ignore}
    meant = [key for key in _CHANGES_THE_PROMPT if row.get(key)]
    if meant:
        raise ValueError(
            f"{', '.join(meant)}: not supported, and without it the model would see a different conversation; "
            "to train without it, list it in data.ignore_keys"
        )
    _refuse_other_objectives(row, None, _PREFERENCE, ignore)
    name = _detect(row)
    if only not in ("auto", name):
        raise ValueError(f"is of format {name}, the recipe says format: {only}")
    _refuse_other_objectives(row, name, (), ignore)
    for key in ("messages", "conversations", "history"):
        if key in _USED[name] and isinstance(row.get(key), str):
            row[key] = _listed(row[key], key)
    useless = [key for key in ("system", "history", "tools", "functions") if key not in _USED[name]]
    useless = [key for key in useless if not _is_empty(row.get(key))]
    if useless:
        raise ValueError(
            f"{', '.join(useless)}: rows of format {name} cannot hold it; put it into the {_KEYS[name][0]}, or ignore "
            "it with data.ignore_keys"
        )
    nulls = _count_nulls(row)
    seen = {key: _without_nulls(inner) for key, inner in row.items()}
    conversation, ignored = _READERS[name](seen, ignore)
    unused = {str(key) for key, inner in value.items() if key not in _USED[name] and not _is_empty(inner)} | ignored
    return name, replace(conversation, unused=tuple(sorted(unused)), nulls=nulls)


def _is_empty(value):
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _refuse_other_objectives(row, name, preference, ignore):
    """Raise ValueError where the row says that its answer is a good or a bad one: supervised training would learn both."""
    found = [key for key in preference if key not in ignore and not _is_empty(row.get(key))]
    if found:
        raise ValueError(
            f"has {', '.join(found)}: a preference pair, for DPO; supervised training does not take it. Map the good answer "
            "(data.columns.completion: chosen), or leave the keys out with data.ignore_keys"
        )
    for key in _DESIRABLE if name not in (None, "text") else ():
        said = row.get(key)
        if key not in ignore and (isinstance(said, bool) or (isinstance(said, str) and said in ("True", "False"))):
            raise ValueError(
                f"has {key}: {str(said).lower()}, which marks good and bad answers, for KTO; supervised training does not "
                f"take it, it would learn the bad ones too. Keep the good rows, without {key}"
            )


def _listed(text, name):
    """Return the list that stands in `text` as JSON, as in a cell of a CSV file."""
    if not text.strip():
        return None
    try:
        return loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is a string, but not a JSON list: {error}; write it with json.dumps") from None


def _without_nulls(value):
    """Return `value` without the keys whose value is null.

    Arrow and `datasets` fill them in where structs of one column have different keys, in Parquet and in what is written as
    JSON from there. JSON that stands in a string keeps its nulls: nobody fills those in.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _count_nulls(value, shown=False):
    """Return how many null keys stand in what a template would write out: arguments of calls, and tools."""
    if isinstance(value, dict):
        return sum(
            shown if inner is None else _count_nulls(inner, shown or key in ("arguments", "tools", "functions"))
            for key, inner in value.items()
        )
    return sum(_count_nulls(inner, shown) for inner in value) if isinstance(value, list) else 0


def _detect(keys, what="keys"):
    for name, needed in _KEYS.items():
        if all(key in keys for key in needed):
            return name
    raise ValueError(
        f"{what} {', '.join(map(str, keys)) or 'none'} match no known format; give {SHAPES}, or data.columns"
    )


def _messages(value, ignore):
    return _checked(value.get("messages"), "messages", value, ignore)


def _sharegpt(value, ignore):
    return _checked(value.get("conversations"), "conversations", value, ignore)


def _completion(value, ignore):
    prompt, completion = value.get("prompt"), value.get("completion")
    prompt, completion = _messages_in(prompt), _messages_in(completion)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise ValueError("prompt and completion are strings or lists of messages")
    return _checked(prompt + completion, "prompt + completion", value, ignore, completion=len(prompt))


def _messages_in(value):
    """Return the messages that the string `value` is as JSON, as in a cell of a CSV file; or `value`."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        with contextlib.suppress(ValueError):
            found = loads(value)
            if all(isinstance(one, dict) and one.get("role") in _ROLE_NAMES and "content" in one for one in found):
                return found
    return value


def _alpaca(value, ignore):
    for key in ("instruction", "input", "output"):
        required = key in ("instruction", "output")
        if not isinstance(value.get(key), str) and (required or value.get(key) is not None):
            raise ValueError(f"{key} is {_kind(value.get(key))}, not a string")
    parts = [value["instruction"], value.get("input")]
    messages = [
        {"role": "user", "content": "\n\n".join(part for part in parts if part)},
        {"role": "assistant", "content": value["output"]},
    ]
    return _checked(messages, "instruction + output", value, ignore)


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


def _with_context(messages, value):
    """Return `messages` with the row's own `system` and `history` before them."""
    first = messages[:1] if isinstance(messages[0], dict) and _named(messages[0]) in ("system", "developer") else []
    messages = first + _history(value.get("history")) + messages[len(first) :]
    system = value.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise ValueError(f"system is {_kind(system)}, not a string")
    if not first:
        return [{"role": "system", "content": system}, *messages]
    said = {"content": first[0].get("content", first[0].get("value"))}
    if _plain_keys(said, "system").get("content") != system:
        raise ValueError("system differs from the system message; keep one of them")
    return messages


def _named(message):
    return message.get("role", message.get("from"))


def _plain_text(value, ignore):
    text = value.get("text")
    if not isinstance(text, str):
        raise ValueError(f"text is {_kind(text)}, not a string")
    if not text.strip():
        raise ValueError("text is empty")
    refuse_surrogates("text", text)
    return Conversation([], text=text), set()


_KEYS = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
_USED = {
    "messages": ("messages", "system", "tools", "functions"),
    "alpaca": ("instruction", "input", "output", "system", "history", "tools", "functions"),
    "completion": ("prompt", "completion", "system", "history", "tools", "functions"),
    "sharegpt": ("conversations", "system", "tools", "functions"),
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
    if value.get("functions") not in (None, [], "", tools):
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
        raise ValueError(f"tools is {_kind(tools)}, not a list of functions")
    wrapped = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'tools[{index}] is not a function with a "name"')
        _refuse_no_json(f"tools[{index}]", tool)
        wrapped.append({"type": "function", **tool} if function is not tool else {"type": "function", "function": tool})
    return wrapped


def _checked(messages, name, value, ignore, completion=None):
    """Return (the Conversation of `messages` and of what else the row `value` says, keys of messages that are ignored)."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} is {_kind(messages)}, not a list of messages")
    before = len(messages)
    if completion is not None and not 0 < completion < before:
        raise ValueError("prompt and completion must both have a message")
    messages = _with_context(messages, value)
    added = len(messages) - before  # `at` counts as the row does
    turns, ignored, merged, begins = [], set(), 0, None
    for index, message in enumerate(messages):
        at = f"{name}[{index - added}]" if index >= added else f"system or history, message {index}"
        if not isinstance(message, dict):
            raise ValueError(f'{at} is {_kind(message)}, not {{"role", "content"}}')
        ignored |= {key for key in ignore if not _is_empty(message.get(key))}
        message = _plain_keys({key: inner for key, inner in message.items() if key not in ignore}, at)
        cleaned, flag = _message(message, at), _flag(message, at)
        if flag and cleaned["role"] != "assistant":
            raise ValueError(f"{at}.train: only the assistant's messages can be trained on one by one")
        if cleaned["role"] == "system" and index != 0:
            raise ValueError(f"{at}: a system message can only come first")
        if completion is not None and index == completion + added:
            begins = len(turns)
        if cleaned["role"] == "assistant" and turns and turns[-1][0]["role"] == "assistant":
            if begins == len(turns):
                raise ValueError(
                    f"{at}: the prompt ends with the assistant; end it with the message that the assistant answers"
                )
            turns[-1] = (_merged(turns[-1], (cleaned, flag), at), flag)
            merged += 1
        else:
            turns.append((cleaned, flag))
    last = turns[-1][0]["role"]
    if last != "assistant":
        raise ValueError(f"{name} ends with the {last}; the last message is the answer to learn")
    flags = tuple(
        (index, flag) for index, (turn, flag) in enumerate(turns) if flag is not None and turn["role"] == "assistant"
    )
    cleaned = [turn for turn, _ in turns]
    return Conversation(cleaned, _tools(value), flags, begins, merged=merged > 0), ignored


def _merged(before, after, at):
    """Return the one turn that chat makes of two messages of the assistant: its words, then its calls."""
    (first, first_flag), (second, second_flag) = before, after
    if not second.get("tool_calls") or second["content"].strip():
        raise ValueError(
            f"{at}: two assistant messages in a row, which a chat cannot produce; join them, or put the user's message "
            "or the tool's result between them"
        )
    if first_flag != second_flag or second.get("reasoning_content"):
        what = "train" if first_flag != second_flag else "reasoning_content"
        raise ValueError(f"{at}: is one turn with the message before it, but has another {what}; join them yourself")
    return {**first, "tool_calls": [*first.get("tool_calls", []), *second["tool_calls"]]}


def _plain_keys(message, at):
    """Return the message with `role` and `content`, whatever it calls them, parts of its content in the keys they mean."""
    message = {key: inner for key, inner in message.items() if not _is_empty(inner) or key in ("content", "value")}
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


_PARTS = ("reasoning", "tool_call", "text")


def _calls(text, at):
    """Return the tool calls that stand in `text`: a JSON object with name and arguments, or a list of them."""
    try:
        calls = loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{at}.value is not a JSON function call: {error}") from None
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _message(message, at):
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


def _text_of(content, at):
    if not isinstance(content, str):
        raise ValueError(f"{at}.content is {_kind(content)}, not a string")
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
        raise ValueError(f"{at}.arguments is {_kind(arguments)}, not an object")
    _refuse_no_json(f"{at}.arguments", [function["name"], arguments])
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _flag(message, at):
    """Return whether the row itself says that this message is trained (`train`, or a weight of 0 or 1), or None."""
    said = {key: message[key] for key in ("train", "weight", "loss_weight") if message.get(key) is not None}
    for key, value in said.items():
        if key == "train" and not isinstance(value, bool):
            raise ValueError(f"{at}.train is {value!r}, not one of True, False")
        if key != "train" and (isinstance(value, bool) or not isinstance(value, (int, float)) or value not in (0, 1)):
            raise ValueError(f"{at}.{key} is {value!r}, not 0 or 1: a message is trained or it is not; set one of them")
    if len(set(map(bool, said.values()))) > 1:
        raise ValueError(f"{at}: {' and '.join(said)} disagree; keep one of them")
    return bool(next(iter(said.values()))) if said else None


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
