"""Conversation -> token ids and loss mask, by the model's own chat template, which is never edited.

The string that training sees is the string that `chat`, and any server that applies the saved template, will make:
the conversation is rendered once, tokenized once without added special tokens (so no second BOS), and the trained
spans are found by prefix differences of rendered strings. A trained span is an assistant's words and the token that
ends the turn. A template that shows earlier turns otherwise once later ones follow (Mistral's moves the system message,
those of reasoning models leave old thoughts out, or open only the last answer with an empty one) gets one row per answer:
the prompt that chat would show, and the answer.
"""

from __future__ import annotations

import bisect
import json
import re
from dataclasses import dataclass

import jinja2
import jinja2.sandbox

from .. import bounded, files
from ..errors import InputError
from .formats import Conversation, refuse_surrogates

IGNORE_INDEX = -100  # what cross_entropy skips

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

_MARK = "\ue000mark\ue000"  # private use: stands in no template
_AS_TEXT, _END = "\ufdd0", "\ufdd1"  # around a control token that a row holds as text; no text may hold these two
_LONG = 2**22  # characters: some seconds of tokenizing
_PROBE = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "WORDS"}]


@dataclass(frozen=True)
class Example:
    """`input_ids` and `labels` of equal length; labels are IGNORE_INDEX where nothing is trained."""

    input_ids: list
    labels: list

    @property
    def num_trained(self):
        return sum(label != IGNORE_INDEX for label in self.labels)


def template_text(tokenizer, chat_template, new_tokens=()):
    """Return the text of the template that `set_template` will give `tokenizer` once it has `new_tokens` too; of the
    built-in ones, what is written as tokens.

    Raises:
        InputError: the file is missing.
    """
    if chat_template is None and tokenizer.chat_template:
        return str(tokenizer.chat_template)
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


def set_template(tokenizer, chat_template):
    """Give `tokenizer` the template `chat_template` (a file, or "chatml"), or its own, or a built-in one; return which,
    in words.

    Raises:
        InputError: the file is missing or is not a Jinja template that ends, or ChatML's markers are not tokens.
    """
    if chat_template == "chatml":
        return _set_chatml(tokenizer)
    if chat_template is not None:
        tokenizer.chat_template = template_text(tokenizer, chat_template)
        try:
            render(tokenizer, _PROBE)
        except (ValueError, InputError) as error:
            raise InputError(f"data.chat_template {chat_template}: {error}") from None
        return f"from {chat_template}"
    if tokenizer.chat_template:
        return "the model's own"
    if all(marker in tokenizer.get_vocab() for marker in CHATML_MARKERS):
        return f"{_set_chatml(tokenizer)} (the model has none)"
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has no chat template and no end token; give data.chat_template")
    tokenizer.chat_template = FALLBACK_TEMPLATE.replace("ADD_BOS", str(_adds_bos(tokenizer)))
    return "built in (the model has none): <|role|> headers, turns closed by the end token"


def _set_chatml(tokenizer):
    missing = [marker for marker in CHATML_MARKERS if marker not in tokenizer.get_vocab()]
    if missing:
        raise InputError(
            f"data.chat_template chatml: {', '.join(missing)} are no tokens of this model, so it could never learn to stop; "
            "add them with model.new_tokens, or leave chat_template out for turns that end with the model's own end token"
        )
    tokenizer.chat_template = CHATML.replace("ADD_BOS", str(_adds_bos(tokenizer)))
    return "ChatML, built in"


def _adds_bos(tokenizer):
    return tokenizer.bos_token_id is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]


def render(tokenizer, messages, add_generation_prompt=False, tools=None, **variables):
    """Return the template's string for `messages`.

    Raises:
        ValueError: the template refuses the conversation; says why.
        InputError: it is no Jinja template, reaches out of its sandbox, or runs on and on; it would in other rows too.
    """

    def rendered(messages):
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
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
        raise _hostile(f"asks for more than {bounded.BYTES >> 20:,} MiB of memory for one conversation") from None
    except jinja2.TemplateSyntaxError as error:
        raise _hostile(f"is not a Jinja template: line {error.lineno}: {error.message}") from None
    except jinja2.sandbox.SecurityError as error:
        raise _hostile(f"does what a template must not: {error}") from None
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from None
    except Exception as error:  # a program that others wrote: it divides by zero, calls itself without end, ...
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"the chat template refuses this conversation: {what}") from None
    if len(text) > _LONG and len(text) > 10 * _size([messages, tools]):
        raise _hostile(f"makes {len(text):,} characters of one conversation")
    return text


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


def encode_prompt(tokenizer, messages, tools=None):
    """Return the token ids of what the model is shown before it answers; control tokens in `messages` stay text.

    Raises:
        ValueError: the template refuses the conversation, or leaves a message out; or a message is no text.
    """
    for message in messages:
        refuse_surrogates(f"the message of the {message['role']}", message.get("content") or "")
    messages, tools = _with_marks(tokenizer, messages, tools)
    text = render(tokenizer, messages, True, tools)
    if not _holds(text, messages, tools):  # it may change words, as one does that takes control tokens out
        asked = [message for message in messages if message["role"] != "assistant"]
        shown = render(tokenizer, [{**message, "content": _MARK} for message in messages], True, tools).count(_MARK)
        if shown < len(asked):
            raise ValueError(
                f"the chat template leaves out {len(asked) - shown} of the {len(asked)} messages that are not the assistant's; "
                "give another data.chat_template"
            )
    return _tokenize(tokenizer, text).ids


def encode(tokenizer, conversation: Conversation, train_on="assistant") -> list[Example]:
    """Return the Examples of one row: one, or one per answer where the template shows earlier turns otherwise later.

    train_on: "assistant" trains on every assistant message and the token that ends it; "last_assistant" on the last;
    "completion" on those of the row's completion, or after the last user message; "all" on every token. What a row says of
    a message itself goes before it. A row of plain text is trained whole, and ends with the tokenizer's end token.

    Raises:
        ValueError: nothing is to be trained, or the template leaves something out, so the mask would be a guess.
    """
    if conversation.text is not None:
        return [_encode_text(tokenizer, conversation.text)]
    chosen = _chosen(conversation, train_on)
    messages, tools = _with_marks(tokenizer, conversation.messages, conversation.tools)
    everything = train_on == "all"
    whole = _row(tokenizer, messages, tools, render(tokenizer, messages, tools=tools), chosen, everything)
    if whole is not None:
        return [whole]
    rows = []
    for index in chosen[-1:] if everything else chosen:
        so_far = messages[: index + 1]
        row = _row(tokenizer, so_far, tools, _as_in_chat(tokenizer, so_far, tools), [index], everything)
        if row is None:
            if _leaves_thoughts_out(tokenizer, so_far, tools):
                raise ValueError(
                    f"the chat template leaves the thoughts of message {index} out (reasoning_content), so the model would "
                    "learn an answer without them; remove them from the row, or give another data.chat_template"
                )
            raise ValueError(
                f"the chat template renders what comes before message {index}, or the message itself, differently in the "
                "whole conversation than in chat, or leaves words out; give another data.chat_template"
            )
        rows.append(row if everything else _up_to_the_last_trained(row))
    return rows


def _leaves_thoughts_out(tokenizer, messages, tools):
    """True if the last message has thoughts that are not in what the template writes."""
    thoughts = messages[-1].get("reasoning_content")
    return bool(thoughts) and _squeezed(thoughts) not in _squeezed(render(tokenizer, messages, tools=tools))


def _up_to_the_last_trained(example):
    end = max(at for at, label in enumerate(example.labels) if label != IGNORE_INDEX) + 1
    return Example(example.input_ids[:end], example.labels[:end])


def _chosen(conversation, train_on):
    """Return the indices of the assistant messages to train on; raises ValueError if there are none."""
    flags = dict(conversation.flags)
    if train_on == "all" and not all(flags.values()):
        raise ValueError("says train: false of a message, and data.train_on is all; set it to assistant")
    answers = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if train_on == "last_assistant":
        chosen = set(answers[-1:])
    elif train_on == "completion":
        users = [index for index, message in enumerate(conversation.messages) if message["role"] == "user"]
        start = conversation.completion if conversation.completion is not None else max(users, default=-1)
        chosen = {index for index in answers if index >= start}
    else:
        chosen = set(answers)
    trained = [index for index in answers if flags.get(index, index in chosen)]
    if not trained:
        raise ValueError("nothing to train on: every assistant message has train: false")
    return trained


def _row(tokenizer, messages, tools, text, chosen, everything):
    """Return the Example of `text`, the rendered `messages`, with the messages `chosen` trained, or None where the text
    does not say what was meant: it does not begin with the prompt that chat would show, or leaves words out."""
    if not _holds(text, messages, tools):
        return None
    tokens = _tokenize(tokenizer, text)
    facts = _facts(tokenizer)
    labels = [IGNORE_INDEX] * len(tokens.ids)
    for index in chosen:
        prompt = render(tokenizer, messages[:index], add_generation_prompt=True, tools=tools)
        if not text.startswith(prompt):
            return None
        first = bisect.bisect_right(tokens.ends, len(prompt))
        if first < len(tokens.ids) and tokens.starts[first] < len(prompt) and tokens.ids[first] in facts.added:
            first += 1  # the header's last token, which swallows spaces that the answer begins with (Phi-3)
        last = next((at for at in range(first, len(tokens.ids)) if tokens.ids[at] in facts.stops), None)
        if last is None:
            raise ValueError(
                "the chat template does not close the assistant's turn with a token that generation stops at, so the "
                "model would never learn to stop; give another data.chat_template"
            )
        # what the template puts after the end of the turn (a newline) is not the assistant's
        if not _says(text[len(prompt) : tokens.starts[last]], messages[index]):
            return None
        if index + 1 < len(
            messages
        ):  # as the answer is rendered while it is the last message, so the model has to say it
            alone = render(tokenizer, messages[: index + 1], tools=tools)
            if not alone.startswith(text[: tokens.ends[last]]):
                return None
        labels[first : last + 1] = tokens.ids[first : last + 1]
    if everything:
        labels = [IGNORE_INDEX, *tokens.ids[1:]]  # nothing stands before the first token to predict it from
    return Example(tokens.ids, labels)


def _as_in_chat(tokenizer, messages, tools):
    """Return the string of `messages` that begins with what chat would show before the last of them, the answer."""
    text = render(tokenizer, messages, tools=tools)
    prompt = render(tokenizer, messages[:-1], add_generation_prompt=True, tools=tools)
    marked = render(tokenizer, [*messages[:-1], {**messages[-1], "content": _MARK}], tools=tools)
    at = marked.rfind(_MARK)  # the last one: a question may hold anything
    if text.startswith(prompt) or at < 0 or text[:at] != marked[:at]:
        return text
    space = "" if prompt[-1:].isspace() else text[len(text[:at].rstrip()) : at]
    return prompt + space + text[at:]


def _holds(text, messages, tools):
    """True if `text` has the words of every system and user message; raises ValueError unless it has the results of tools
    and names every tool: a model that does not see a result learns to invent it."""
    squeezed = None
    for message in messages:
        if message["role"] not in ("system", "user", "tool") or message["content"].strip() in text:
            continue
        squeezed = squeezed if squeezed is not None else _squeezed(text)
        if message["role"] == "tool" and not _shows_result(squeezed, message["content"]):
            raise ValueError(
                f"the chat template leaves a tool's result out ({message['content'].strip()[:40]!r}), so the model would "
                "learn to invent it; give data.chat_template, e.g. chatml, or a row without calls"
            )
        if message["role"] != "tool" and _squeezed(message["content"]) not in squeezed:
            return False
    missing = [tool["function"]["name"] for tool in tools or () if tool["function"]["name"] not in text]
    if missing:
        raise ValueError(
            f"the chat template leaves the row's tools out ({missing[0]}); give data.chat_template, e.g. chatml"
        )
    return True


def _shows_result(squeezed, content):
    """True if `content` stands in the `squeezed` text: as it is, as a JSON string, or, where it is JSON itself, value by
    value."""
    if _squeezed(content) in squeezed or _squeezed(json.dumps(content, ensure_ascii=False)[1:-1]) in squeezed:
        return True
    try:
        value = json.loads(content)
    except ValueError:
        return False
    return isinstance(value, (dict, list)) and all(_squeezed(leaf) in squeezed for leaf in _leaves(value))


def _leaves(value):
    """Yield the keys and values of a JSON value as text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):  # a template may write them as None and True
        yield str(value)


def _says(region, message):
    """True if `region` is the assistant's message: its words, white space aside, with nothing after them, and its calls."""
    calls = message.get("tool_calls", ())
    for call in calls:
        function = call["function"]
        if any(word not in region for word in (function["name"], *function["arguments"])):
            raise ValueError(
                f"the chat template leaves the call of {function['name']} out; give data.chat_template, e.g. chatml"
            )
    if message.get("reasoning_content") and _squeezed(message["reasoning_content"]) not in _squeezed(region):
        return False
    words = message["content"].strip()
    if calls:
        return _squeezed(words) in _squeezed(region)
    return region.rstrip().endswith(words) or _squeezed(region).endswith(_squeezed(words))


def _squeezed(text):
    return "".join(text.split())


@dataclass(frozen=True)
class _Tokens:
    """ids, and where each token's characters start and end in the text."""

    ids: list
    starts: list
    ends: list


def token_starts(tokenizer, text):
    """Return the position in `text` at which each of its tokens begins."""
    return _tokenize(tokenizer, _marked(text, None)).starts


def _tokenize(tokenizer, text):
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.encode_special_tokens:
        backend.encode_special_tokens = False
    if _AS_TEXT not in text:
        encoding = backend.encode(text, add_special_tokens=False)
        return _Tokens(encoding.ids, [left for left, _ in encoding.offsets], [right for _, right in encoding.offsets])
    return _tokenize_pieces(backend, text)


def _tokenize_pieces(backend, text):
    """Tokenize a text in which control tokens stand between marks: those are spelled out, all else is as ever."""
    ids, starts, ends, position = [], [], [], 0
    # a template may take a string apart between two marks: a mark that has lost the other is passed over
    for piece in re.split(f"({_AS_TEXT}[^{_AS_TEXT}{_END}]*{_END}|[{_AS_TEXT}{_END}])", text):
        spelled, lone = piece[:1] == _AS_TEXT and len(piece) > 1, piece in (_AS_TEXT, _END)
        for at, part in _spelled(backend, piece[1:-1]) if spelled else [(0, "" if lone else piece)]:
            begin = position + spelled + at
            for token, left, right in _tokens_inside(backend, part, first=begin == 0, spelled=spelled):
                ids.append(token)
                starts.append(begin + left)
                ends.append(begin + right)
        position += len(piece)
    return _Tokens(ids, starts, ends)


def _spelled(backend, piece):
    """Return the control token as [(position, part), ...] that hold no added token."""
    backend.encode_special_tokens = True
    try:
        whole = backend.token_to_id(piece) not in backend.encode(piece, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = False
    return [(0, piece)] if whole else [(0, piece[:1]), (1, piece[1:])]  # the library only takes "special" ones as text


def _tokens_inside(backend, piece, first, spelled):
    """Return (id, start, end) of the tokens of `piece`, as it stands inside a text if not `first`."""
    if not piece:
        return []
    # some tokenizers put a space before a text's first word, so the piece is made to stand behind something else
    lead = "" if first else "x" if piece[0].isspace() else "\n"
    backend.encode_special_tokens = spelled
    try:
        encoding = backend.encode(lead + piece, add_special_tokens=False)
        skip = len(backend.encode(lead, add_special_tokens=False).ids) if lead else 0
    finally:
        backend.encode_special_tokens = False
    if lead and encoding.offsets[skip - 1][1] != len(lead):
        raise ValueError(
            f"this tokenizer cannot take a control token as text (near {piece[:20]!r}); take it out of the row"
        )
    tokens = list(zip(encoding.ids, encoding.offsets, strict=True))[skip:]
    return [(token, left - len(lead), right - len(lead)) for token, (left, right) in tokens]


def _with_marks(tokenizer, messages, tools):
    """Return messages and tools with marks around the control tokens in their strings.

    In the assistant's words those are the special tokens; elsewhere also the other added tokens that the template writes,
    such as <tool_call>, which are the assistant's to say.
    """
    facts = _facts(tokenizer)
    marked = [
        _marked(message, facts.control if message["role"] == "assistant" else facts.template_control)
        for message in messages
    ]
    return marked, _marked(tools, facts.template_control) if tools else None


def _marked(value, pattern):
    """Return `value` (a string, or lists and dicts of them) with marks around every control token in its strings."""
    if isinstance(value, str):
        if _AS_TEXT in value or _END in value:
            raise ValueError("holds U+FDD0 or U+FDD1, which are no characters")
        return pattern.sub(f"{_AS_TEXT}\\g<0>{_END}", value) if pattern is not None else value
    if isinstance(value, dict):
        return {key: _marked(inner, pattern) for key, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner, pattern) for inner in value]
    return value


def _encode_text(tokenizer, text):
    ids = list(_tokenize(tokenizer, _marked(text, _facts(tokenizer).control)).ids)
    if _facts(tokenizer).adds_bos:
        ids.insert(0, tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return Example(ids, [IGNORE_INDEX, *ids[1:]])


@dataclass(frozen=True)
class _Facts:
    """What is worth finding out once of a tokenizer and its template.

    control: matches the special tokens; template_control: those, and other added tokens that the template writes.
    """

    stops: frozenset
    added: frozenset
    control: re.Pattern | None
    template_control: re.Pattern | None
    adds_bos: bool


def _facts(tokenizer):
    key = (tokenizer.chat_template, len(tokenizer), known_stops(tokenizer))
    cached = getattr(tokenizer, "_qlora_facts", None)
    if cached is None or cached[0] != key:
        added = list(tokenizer.added_tokens_decoder.values())
        template = tokenizer.chat_template or ""
        written = [token.content for token in added if token.content in template and not token.content.isspace()]
        special = [token.content for token in added if token.special]
        facts = _Facts(
            frozenset(stop_token_ids(tokenizer)),
            frozenset(tokenizer.added_tokens_decoder),
            _any_of(special),
            _any_of([*special, *written]),
            _adds_bos(tokenizer),
        )
        cached = tokenizer._qlora_facts = (key, facts)
    return cached[1]


def _any_of(words):
    """Return a pattern that matches any of `words`, the longest first, or None for none."""
    return re.compile("|".join(map(re.escape, sorted(set(words), key=len, reverse=True)))) if words else None


def know_stops(tokenizer, generation_config):
    """Tell `tokenizer` at which ids generation ends by the model's generation_config (None: it has none): some templates
    close a call of tools with another token than an answer (gpt-oss: <|call|>)."""
    tokenizer._qlora_stops = _listed_ends(generation_config)


def known_stops(tokenizer):
    return getattr(tokenizer, "_qlora_stops", frozenset())


def _listed_ends(generation_config):
    listed = None if generation_config is None else generation_config.eos_token_id
    return frozenset(listed if isinstance(listed, (list, tuple)) else {listed} - {None})


def stop_token_ids(tokenizer, generation_config=None):
    """Return the set of ids at which generation ends: the tokenizer's end token, those of `generation_config` and of
    `know_stops`, and the special token with which the template closes an assistant turn."""
    named = known_stops(tokenizer) | _listed_ends(generation_config)
    return ({tokenizer.eos_token_id} - {None}) | named | _turn_end_ids(tokenizer)


def _turn_end_ids(tokenizer):
    """Render a probe conversation and return the first special token after the assistant's word, as a set of 0 or 1."""
    if not tokenizer.chat_template:
        return set()
    try:
        tail = render(tokenizer, _PROBE).rpartition("WORDS")[2]
    except ValueError:
        return set()
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    found = [token for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if token in special]
    return set(found[:1])
