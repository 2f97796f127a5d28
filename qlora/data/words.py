"""What a conversation says, and whether a rendered text shows it: each message's words, calls and results, in their order.

A template is a program of others. That it shows every message is seen twice: on the conversation with a mark in the place of each
text, which no other text can be mistaken for, and on the words themselves, in order, white space aside.
"""

from __future__ import annotations

import json
import re

_INLINE = re.compile(r"(?P<open>\s*<think>)?(?P<thoughts>.*?)(?P<close></think>)(?P<words>.*)", re.DOTALL)
_ESCAPED = re.compile(r'[\x00-\x1f"\\]')  # what JSON writes otherwise
_OUTER = re.compile(r"\S(?:.*\S)?", re.DOTALL)  # a text without the white space around it
_TEMPLATE = "give another data.chat_template"


def thoughts_and_words(message):
    """Return (thoughts, words) of a message: thoughts are its reasoning_content, or stand in <think> tags before the words."""
    content = message["content"]
    if "reasoning_content" in message:
        return message["reasoning_content"], content
    inline = _inline(message)
    return (inline["thoughts"], inline["words"]) if inline else ("", content)


def _inline(message):
    """Return the match of thoughts in tags and words in what the assistant says, or None."""
    return _INLINE.fullmatch(message["content"]) if message["role"] == "assistant" else None


def spellings(messages, template):
    """Yield `messages`, then the same with thoughts as the other half of the templates takes them: under reasoning_content
    instead of inline, or inline in <think> tags, if the `template` knows those."""
    yield messages
    if "</think>" in str(template) or not any("reasoning_content" in message for message in messages):
        other = [_other_spelling(message) for message in messages]
        if other != messages:
            yield other


def _other_spelling(message):
    thoughts, words = thoughts_and_words(message)
    if not thoughts.strip():
        return message
    if "reasoning_content" in message:
        rest = {key: value for key, value in message.items() if key != "reasoning_content"}
        return {**rest, "content": f"<think>\n{thoughts.strip()}\n</think>\n\n{words}"}
    return {**message, "content": words.strip("\n"), "reasoning_content": thoughts.strip()}


def without_thoughts(messages):
    """Return `messages` without the thoughts of the assistant.

    Raises:
        ValueError: nothing else is in a message, or where its thoughts begin cannot be told.
    """
    return [_without_thoughts(message, index) for index, message in enumerate(messages)]


def _without_thoughts(message, index):
    message = {key: value for key, value in message.items() if key != "reasoning_content"}
    inline = _inline(message)
    if inline is None:
        return message
    if inline["open"] is None:
        raise ValueError(
            f"message {index} has </think> without <think> before it; data.thoughts cannot tell what to drop"
        )
    message["content"] = inline["words"].lstrip("\n")
    if not message["content"].strip() and not message.get("tool_calls"):
        raise ValueError(f"message {index} has thoughts and nothing else; data.thoughts=drop leaves no answer")
    return message


# ---- which messages a template shows ------------------------------------------------------------------------------------


def dropped(render, marked, marks):
    """Return (index, whether it is its content) of the first message that the function `render` (messages -> text) leaves out, or
    None; the messages are `marked` by `with_marks`. Thoughts are not asked for: templates leave out those of earlier turns."""
    try:
        text = render(marked)
    except ValueError:  # it looks at the words; then `altered` alone can tell
        return None
    before = -1
    for index in sorted(marks):
        places = [text.find(mark) for mark in marks[index]]
        if -1 in places or (marked[index]["role"] != "system" and min(places) < before):
            return index, places[0] == -1 and marks[index][0] in marked[index]["content"]
        if marked[index]["role"] != "system":  # some show that in the last question
            before = max(places)
    return None


def with_marks(messages):
    """Return (messages with a mark for each of their texts, {index of a message: its marks})."""
    marks: dict = {}

    def marked(text, index):
        if not text.strip():
            return text
        mark = f"\ue000{sum(map(len, marks.values()))}\ue001"
        marks.setdefault(index, []).append(mark)
        return _OUTER.sub(mark, text, count=1)

    def replaced(value, index):
        if isinstance(value, str):
            return marked(value, index)
        if isinstance(value, dict):
            return {key: replaced(inner, index) for key, inner in value.items()}
        return [replaced(inner, index) for inner in value] if isinstance(value, list) else value

    def of(message, index):
        inline, head, words = _inline(message), "", message["content"]
        if inline:
            head = (inline["open"] or "") + _OUTER.sub("thoughts", inline["thoughts"], count=1) + inline["close"]
            words = inline["words"]
        message = {**message, "content": head + marked(words, index)}
        calls = [
            {**call, "function": {**call["function"], "arguments": replaced(call["function"]["arguments"], index)}}
            for call in message.get("tool_calls", ())
        ]
        return {**message, "tool_calls": calls} if calls else message

    return [of(message, index) for index, message in enumerate(messages)], marks


def leaves_out(message, index, is_content):
    """Return in words that the template leaves out the `message` at `index`, its content or a call, or shows it elsewhere."""
    role = message["role"]
    if role == "system":
        return f"the chat template leaves the system message out; set data.system_as_user=true, or {_TEMPLATE}"
    if role == "tool":
        return (
            f"the chat template leaves a tool's result out ({message['content'].strip()[:40]!r}), so the model would learn to "
            "invent it; give data.chat_template, e.g. chatml, or a row without calls"
        )
    if message.get("tool_calls"):
        names = ", ".join(repr(call["function"]["name"]) for call in message["tool_calls"])
        if is_content:
            return f"the chat template leaves the words beside the call of {names} out; give data.chat_template, e.g. chatml"
        return (
            f"the chat template leaves the call of {names} out, or a part of it; give data.chat_template, e.g. chatml"
        )
    return f"the chat template leaves message {index} ({role}) out; {_TEMPLATE}"


# ---- whether the words are there ----------------------------------------------------------------------------------------


def altered(text, messages):
    """Return what of `messages` the rendered `text` does not say, in words, or None."""
    found = _out_of_order(text, messages, squeezed=False)
    if found is not None:
        found = _out_of_order(squeeze(text), messages, squeezed=True)
    return None if found is None else leaves_out(messages[found[0]], *found)


def _out_of_order(text, messages, squeezed):
    """Return (index, whether it is its content) of the first message that is not in `text` behind the one before it, or None."""
    at = 0
    for index, message in enumerate(messages):
        begin = 0 if message["role"] == "system" else at
        ends = [_end(text, begin, piece, squeezed) for piece in _pieces(message)]  # the first is the content
        if -1 in ends:
            return index, ends[0] == -1
        at = max([at, *ends]) if message["role"] != "system" else at
    return None


def _pieces(message):
    """Return what a message says besides its thoughts: of each piece, the ways to say it, as lists of strings to be found."""
    words = thoughts_and_words(message)[1]
    ways = _said(words)
    if message["role"] == "tool" and words.lstrip()[:1] in ("{", "["):
        ways += _values_of(words)
    return [ways, *(_ways(leaf) for call in message.get("tool_calls", ()) for leaf in _said_by(call))]


def _values_of(content):
    """Return the one way to say JSON value by value, or none where `content` is no JSON."""
    try:
        leaves = [leaf for leaf in _leaves(json.loads(content)) if leaf is not None and not isinstance(leaf, bool)]
    except ValueError:
        return []
    return [[str(leaf) for leaf in leaves]]


def _said_by(call):
    yield call["function"]["name"]
    yield from _leaves(call["function"]["arguments"])


def _leaves(value):
    """Yield the keys and the values of a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _ways(leaf):
    if isinstance(leaf, str):
        return _said(leaf)
    return [[json.dumps(leaf)], [str(leaf)]]  # true or True


def _said(text):
    """Return the ways to say `text`: as it is, and as it stands in JSON where that is another."""
    escaped = _escaped(text)
    return [[text]] if escaped == text else [[text], [escaped]]


def _escaped(text):
    """Return `text` as it stands between the quotes of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1] if _ESCAPED.search(text) else text


def _end(text, begin, ways, squeezed):
    """Return where the earliest of `ways` ends in `text` from `begin` on, or -1."""
    ends = []
    for way in ways:
        each = [squeeze(piece) if squeezed else piece.strip() for piece in way]
        places = [(text.find(piece, begin), len(piece)) for piece in each]
        if all(place >= 0 for place, _ in places):
            ends.append(max((place + length for place, length in places), default=begin))
    return min(ends, default=-1)


def misses(region, message, index):
    """Return what is wrong with `region`, the part of the text that is the assistant's message `index`, in words, or None: it has
    the thoughts once, the words, with nothing after them but calls, and the calls."""
    squeezed = squeeze(region)
    thoughts, words = thoughts_and_words(message)
    inner = squeeze(thoughts)
    if inner not in squeezed:
        return (
            f"the chat template leaves the thoughts of message {index} out; put them into its content in <think> tags, remove "
            f"them with data.thoughts=drop, or {_TEMPLATE}"
        )
    twice = squeezed.count(inner) > squeeze(thoughts + words).count(inner)
    if inner and (twice or region.count("</think>") > 1 + (thoughts + words).count("</think>")):
        return f"the chat template shows thoughts twice before message {index}; {_TEMPLATE}"
    found = _out_of_order(squeezed, [message], squeezed=True)
    if found is not None:
        return leaves_out(message, index, found[1])
    if not message.get("tool_calls") and not squeezed.endswith(squeeze(words)):
        return f"the chat template writes something behind the words of message {index}; {_TEMPLATE}"
    return None


def end_of_thoughts(region, message):
    """Return the position in `region`, the assistant's part of the text, at which the message's thoughts end; 0 without any."""
    thoughts = thoughts_and_words(message)[0].split()
    if not thoughts:
        return 0
    found = re.search(r"\s*".join(map(re.escape, thoughts)), region)
    return found.end() if found else 0


def squeeze(text):
    """Return `text` without white space."""
    return "".join(text.split())


# ---- what is left out of less weight, and counted -------------------------------------------------------------------------


def left_out(text, messages, tools):
    """Return the set of keys of the row whose text is not in the rendered `text`: names, ids, what describes a tool."""
    named = [(key, message[key]) for message in messages for key in ("name", "tool_call_id") if key in message]
    named += [
        ("tool_calls.id", call["id"]) for message in messages for call in message.get("tool_calls", ()) if "id" in call
    ]
    named += [(f"tools.{key}", said) for tool in tools or () for key, said in _described({**tool, "type": ""}, "")]
    if not named:
        return set()
    squeezed = squeeze(text)
    return {key for key, said in named if squeeze(said) not in squeezed and squeeze(_escaped(said)) not in squeezed}


def _described(value, key):
    """Yield (key, text) of what a tool's schema says."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if key == "properties":
                yield "properties", name
            yield from _described(inner, name if key != "properties" else "")
    elif isinstance(value, list):
        for inner in value:
            yield from _described(inner, key)
    elif isinstance(value, str):
        yield key, value
