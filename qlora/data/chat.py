"""The model's own chat template: what a conversation is as text, and which tokens end an answer.

The template is never edited; `system_as_user` puts a line before it. It is saved with the adapter, so that `chat`, and any
server that applies it, makes the string that training saw.
"""

from __future__ import annotations

import json

import jinja2
import jinja2.sandbox

from ..system import bounded, files
from ..system.errors import InputError

CHATML = """\
{{ bos_token if ADD_BOS else '' }}\
{% if tools %}{{ '<|im_start|>system\\n' }}\
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}\
{{ 'Functions that can be called, as JSON schemas, one a line:\\n<tools>' }}\
{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}\
{{ '\\n</tools>\\nTo call one, write:\\n<tool_call>\\n{"name": NAME, "arguments": {...}}\\n</tool_call><|im_end|>\\n' }}\
{% endif %}{% for message in messages %}{% if not (tools and loop.first and message['role'] == 'system') %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}\
{% for call in message['tool_calls'] or [] %}\
{{ ('\\n' if message['content'] or not loop.first else '') + '<tool_call>\\n{"name": ' + (call['function']['name'] | tojson)
+ ', "arguments": ' + (call['function']['arguments'] | tojson) + '}\\n</tool_call>' }}{% endfor %}\
{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CHATML_MARKERS = ("<|im_start|>", "<|im_end|>")

# For base models without a template and without ChatML's markers. Each turn ends with the tokenizer's own end token: always
# one token, and one that generation stops at (ChatML's <|im_end|> would be six ordinary tokens in most vocabularies).
FALLBACK_TEMPLATE = """\
{{ bos_token if ADD_BOS else '' }}{% for message in messages %}\
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# before a template that knows no system message: it becomes the beginning of the first question, or a question of its own
_SYSTEM_AS_USER = """\
{%- if messages and messages[0]['role'] == 'system' -%}\
{%- if messages[1:] and messages[1]['role'] == 'user' -%}\
{%- set between = '\\n\\n' if messages[0]['content'] is string else [{'type': 'text', 'text': '\\n\\n'}] -%}\
{%- set asked = messages[0]['content'] + between + messages[1]['content'] -%}\
{%- set messages = [{'role': 'user', 'content': asked}] + messages[2:] -%}\
{%- else -%}{%- set messages = [{'role': 'user', 'content': messages[0]['content']}] + messages[1:] -%}\
{%- endif -%}{%- endif -%}"""
_LONG = 2**22  # characters: some seconds of tokenizing
_PROBE = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "WORDS"}]
_PROBE_CALL = {"type": "function", "function": {"name": "WORDS", "arguments": {}}}


def template_text(tokenizer, chat_template, new_tokens=()):
    """Return the text of the template that `set_template` will give `tokenizer` once it has `new_tokens` too; of the
    built-in ones, what is written as tokens.

    Raises:
        InputError: the file is missing.
    """
    if chat_template is None and tokenizer.chat_template:
        return written(tokenizer)
    if chat_template == "chatml" or (
        chat_template is None and tokenizer.get_vocab().keys() | set(new_tokens) >= set(CHATML_MARKERS)
    ):
        return "".join(CHATML_MARKERS)  # not <tool_call>, which is the assistant's to say
    if chat_template is None:
        return FALLBACK_TEMPLATE
    try:
        return files.read(chat_template, "data.chat_template")
    except FileNotFoundError:
        raise InputError(f"data.chat_template {chat_template}: there is no such file, and it is not chatml") from None


def written(tokenizer):
    """Return the text of `tokenizer`'s template; of several by name, such as that for rows with tools, one after the other."""
    template = tokenizer.chat_template or ""
    return "\n".join(template.values()) if isinstance(template, dict) else template


def set_template(tokenizer, chat_template, system_as_user=False):
    """Give `tokenizer` the template `chat_template` (a file, or "chatml"), or its own, or a built-in one; return which,
    in words. system_as_user: with a line before it that puts the system message into the first question.

    Raises:
        InputError: the file is missing or is not a Jinja template that ends, or ChatML's markers are not tokens.
    """
    which = _set_template(tokenizer, chat_template)
    if "strftime_now" in written(tokenizer):
        which += (
            "; it writes the date on which rows are tokenized into each of them: for the same rows on another day give "
            "data.chat_template a copy with a fixed date"
        )
    if system_as_user:
        template = tokenizer.chat_template
        named = isinstance(template, dict)
        tokenizer.chat_template = (
            {name: _SYSTEM_AS_USER + text for name, text in template.items()} if named else _SYSTEM_AS_USER + template
        )
        which += "; the system message becomes the beginning of the first question"
    return which


def _set_template(tokenizer, chat_template):
    missing = [marker for marker in CHATML_MARKERS if marker not in tokenizer.get_vocab()]
    if chat_template == "chatml" and missing:
        raise InputError(
            f"data.chat_template chatml: {', '.join(missing)} are not tokens of this model, so it could not learn to stop; "
            "add them with model.new_tokens, or remove chat_template to end turns with the model's own end token"
        )
    if chat_template == "chatml" or (chat_template is None and not (tokenizer.chat_template or missing)):
        tokenizer.chat_template = CHATML.replace("ADD_BOS", str(adds_bos(tokenizer)))
        return "ChatML, built in" + ("" if chat_template else " (the model has none)")
    if chat_template is not None:
        tokenizer.chat_template = template_text(tokenizer, chat_template)
        try:
            render(tokenizer, _PROBE)
        except (ValueError, InputError) as error:
            raise InputError(f"data.chat_template {chat_template}: {error}") from None
        return f"from {chat_template}"
    if tokenizer.chat_template:
        return "the model's own"
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has no chat template and no end token; give data.chat_template")
    tokenizer.chat_template = FALLBACK_TEMPLATE.replace("ADD_BOS", str(adds_bos(tokenizer)))
    return "built in (the model has none): <|role|> headers, turns closed by the end token"


def adds_bos(tokenizer):
    return tokenizer.bos_token_id is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]


def render(tokenizer, messages, add_generation_prompt=False, tools=None, **variables):
    """Return the template's string for `messages`.

    Raises:
        ValueError: the template refuses the conversation; says why.
        InputError: it is no Jinja template, reaches out of its sandbox, or runs on and on; it would in other rows too.
    """

    def rendered(messages):
        return tokenizer.apply_chat_template(
            _in_parts(messages) if _takes_parts(tokenizer) else messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )

    def rendered_somehow():
        try:
            return rendered(messages)
        except TypeError:  # DeepSeek-V3's template writes the arguments of a call as they are: it wants JSON text
            in_json = _with_json_arguments(messages)
            if in_json == messages:
                raise
            return rendered(in_json)

    try:
        text = bounded.call(rendered_somehow)
    except bounded.TookTooLong:
        raise _hostile(f"was still running after {bounded.SECONDS} seconds on one conversation") from None
    except MemoryError:
        raise _hostile(f"needs more than {bounded.BYTES >> 20:,} MiB of memory for one conversation") from None
    except jinja2.TemplateSyntaxError as error:
        raise _hostile(f"is not a Jinja template: line {error.lineno}: {error.message}") from None
    except jinja2.sandbox.SecurityError as error:
        raise _hostile(f"does something a template must not do: {error}") from None
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from None
    except Exception as error:  # a program that others wrote: it divides by zero, calls itself without end, ...
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"the chat template refuses this conversation: {what}") from None
    if len(text) > _LONG and len(text) > 10 * _size([messages, tools]):
        raise _hostile(f"turns one conversation into {len(text):,} characters")
    return text


def _takes_parts(tokenizer):
    """True if the template shows messages that are lists of parts and not those that are strings, as those of some multimodal
    models."""
    cached = getattr(tokenizer, "_qlora_parts", None)
    if cached is None or cached[0] != tokenizer.chat_template:

        def shows(messages):
            try:
                return "WORDS" in bounded.call(lambda: tokenizer.apply_chat_template(messages, tokenize=False))
            except Exception:  # whatever it is, the caller's own rendering meets it again, and says so
                return False

        parts = not shows(_PROBE) and shows(_in_parts(_PROBE))
        cached = tokenizer._qlora_parts = (tokenizer.chat_template, parts)
    return cached[1]


def _in_parts(messages):
    """Return `messages` with each string content as a list of one part."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _with_json_arguments(messages):
    """Return `messages` with the arguments of every call as a string of JSON."""
    return [
        {**message, "tool_calls": [_with_json(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_json(call):
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _hostile(what):
    return InputError(f"the chat template {what}; give another data.chat_template, a file or chatml")


def _size(value):
    """Return the number of characters in a nest of lists and dicts."""
    if isinstance(value, (list, tuple)):
        return sum(map(_size, value))
    if isinstance(value, dict):
        return _size([*value.keys(), *value.values()])
    return len(str(value))


def know_stops(tokenizer, generation_config):
    """Tell `tokenizer` at which ids generation ends by the model's generation_config (None: it has none): some templates
    close a call of tools with another token than an answer (gpt-oss: <|call|>)."""
    tokenizer._qlora_stops = _listed_ends(generation_config)


def known_stops(tokenizer):
    return vars(tokenizer).get("_qlora_stops", frozenset())  # getattr would search its special tokens, for each row


def _listed_ends(generation_config):
    listed = None if generation_config is None else generation_config.eos_token_id
    return frozenset(listed if isinstance(listed, (list, tuple)) else {listed} - {None})


def stop_token_ids(tokenizer, generation_config=None):
    """Return the set of ids at which generation ends: the tokenizer's end token, those of `generation_config` and of
    `know_stops`, and the special token with which the template closes an assistant turn."""
    named = known_stops(tokenizer) | _listed_ends(generation_config)
    return ({tokenizer.eos_token_id} - {None}) | named | _turn_end_ids(tokenizer)


def _turn_end_ids(tokenizer):
    """Return the first special token after the assistant's word in a probe conversation, as a set of 0 or 1."""
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return set([token for token in _tail(tokenizer) if token in special][:1])


def closing(tokenizer, stops, call):
    """Return what ends the last answer of a conversation, or its last `call` of a tool, where the template leaves that to the
    header of the next turn (GLM-4): a token of `stops`, as text. "" where the template ends it itself, or nothing does."""
    asked, answered = (
        _PROBE if not call else [_PROBE[0], {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}]
    )
    try:
        text = render(tokenizer, [asked, answered])
        longer = render(tokenizer, [asked, answered, {"role": "tool" if call else "user", "content": "Q"}])
    except ValueError:
        return ""
    tail, follows = text.rpartition("WORDS")[2], longer[len(text) :]
    if not longer.startswith(text) or not stops.isdisjoint(tokenizer(tail, add_special_tokens=False)["input_ids"]):
        return ""
    first = tokenizer(follows, add_special_tokens=False)["input_ids"][:1]
    token = tokenizer.convert_ids_to_tokens(first)[0] if first and first[0] in stops else ""
    return token if follows.startswith(token) else ""


def _tail(tokenizer):
    """Return the ids of what the template writes after the assistant's words in a probe conversation."""
    if not tokenizer.chat_template:
        return []
    try:
        tail = render(tokenizer, _PROBE).rpartition("WORDS")[2]
    except ValueError:
        return []
    return tokenizer(tail, add_special_tokens=False)["input_ids"]
