"""One row of any known shape -> its conversation. The shape is read off the row's own keys.

    messages     {"messages": [{"role", "content"}, ...]}
    alpaca       {"instruction", "input"?, "output", "system"?, "history"?: [[user, assistant], ...]}
    completion   {"prompt", "completion"}, strings or lists of messages
    sharegpt     {"conversations": [{"from", "value"}, ...], "system"?}

A `prompt`/`completion` pair of strings becomes one user and one assistant turn, so that training, `chat` and every
server that applies the model's chat template see the same string.
"""

from __future__ import annotations

ROLES = ("system", "user", "assistant")
SHAPES = '"messages", "instruction" + "output", "prompt" + "completion", or "conversations"'
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def renamed(value, columns):
    """Return the row with only the fields that `columns` ({known name: column}) names, under their known names.

    Raises:
        ValueError: the row has no such column.
    """
    if not columns:
        return value
    if not isinstance(value, dict):
        raise ValueError(f"data.columns needs rows with columns, this is {_kind(value)}")
    missing = [column for column in columns.values() if column not in value]
    if missing:
        raise ValueError(f"has no column {', '.join(map(repr, missing))}; it has {', '.join(map(str, value))}")
    return {name: value[column] for name, column in columns.items()}


def to_messages(value):
    """Return (format name, messages) where messages is a list of {"role", "content"} that ends with the assistant.

    Raises:
        ValueError: what is wrong with the row and what is allowed, without file and line.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a row is an object with {SHAPES}, not {_kind(value)}")
    meant = [key for key in ("tools", "functions", "images", "audio") if value.get(key)]
    if meant:  # other unknown keys (id, source, ...) are labels; these would change what the model sees
        raise ValueError(
            f"{', '.join(meant)}: not supported yet, and leaving it out would train on another conversation"
        )
    if "messages" in value:
        return "messages", _checked(value["messages"], "messages")
    if "instruction" in value and "output" in value:
        return "alpaca", _alpaca(value)
    if "prompt" in value and "completion" in value:
        prompt, completion = value["prompt"], value["completion"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            raise ValueError("prompt and completion are strings or lists of messages")
        return "completion", _checked(prompt + completion, "prompt + completion")
    if "conversations" in value:
        return "sharegpt", _sharegpt(value)
    raise ValueError(f"keys {', '.join(map(str, value)) or 'none'} fit no known shape; give {SHAPES}")


def _sharegpt(value):
    turns = value["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('conversations is not a list of {"from", "value"}')
    messages = []
    for index, turn in enumerate(turns):
        role = _SHAREGPT_ROLES.get(turn.get("from"))
        if role is None:
            raise ValueError(
                f"conversations[{index}].from is {turn.get('from')!r}, not one of {', '.join(_SHAREGPT_ROLES)}"
            )
        messages.append({"role": role, "content": turn.get("value")})
    if value.get("system"):
        messages.insert(0, {"role": "system", "content": value["system"]})
    return _checked(messages, "conversations")


def _alpaca(value):
    for key in ("instruction", "input", "output", "system"):
        if key in value and not isinstance(value[key], str):
            raise ValueError(f"{key} is {_kind(value[key])}, not a string")
    parts = [value["instruction"], value.get("input", "")]
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


def _checked(messages, name):
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} is {_kind(messages)}, not a list of messages")
    for index, message in enumerate(messages):
        at = f"{name}[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f'{at} is {_kind(message)}, not {{"role", "content"}}')
        if message.get("role") not in ROLES:
            raise ValueError(f"{at}.role is {message.get('role')!r}, not one of {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str):
            raise ValueError(f"{at}.content is {_kind(content)}, not a string")
        if not content.strip() and message["role"] != "system":
            raise ValueError(f"{at}.content is empty")
        if any("\ud800" <= char <= "\udfff" for char in content):
            raise ValueError(f"{at}.content has half of a surrogate pair (broken \\u escape)")
        unknown = set(message) - {"role", "content"}
        if unknown:
            raise ValueError(f"{at} has {', '.join(sorted(unknown))}: only role and content are understood")
        if message["role"] == "system" and index != 0:
            raise ValueError(f"{at}: a system message can only come first")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{name} ends with the {messages[-1]['role']}; the last message is the answer to learn")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _kind(value):
    if value is None or isinstance(value, (dict, str)):
        return "null" if value is None else "an object" if isinstance(value, dict) else "a string"
    return repr(value) if not isinstance(value, list) else "a list" if value else "an empty list"
