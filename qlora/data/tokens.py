"""Text -> token ids, with the place of each in the text; control tokens that a row holds as text stay text."""

from __future__ import annotations

import bisect
import hashlib
import re
from dataclasses import dataclass, field

from . import chat

_AS_TEXT, _END = "\ufdd0", "\ufdd1"  # around a control token that a row holds as text; no text may hold these two

_MOST_HEADS = 100


@dataclass(frozen=True)
class Tokens:
    """Ids, and where each token's characters start and end in the text."""

    ids: list
    starts: list
    ends: list


def tokenize(tokenizer, text, first=True):
    """Return the Tokens of `text`; not `first`: as it stands behind other text, from which it is cut off.

    Raises:
        ValueError: this tokenizer cannot be made to cut there.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.encode_special_tokens:
        backend.encode_special_tokens = False
    if _AS_TEXT not in text:
        found = _tokens_inside(backend, text, first, spelled=False)
        return Tokens(*(list(column) for column in zip(*found, strict=True))) if found else Tokens([], [], [])
    return _pieces(backend, text, first)


def _pieces(backend, text, first):
    """Tokenize a text in which control tokens stand between marks: those are spelled out, all else is as ever."""
    ids, starts, ends, position = [], [], [], 0
    # a template may take a string apart between two marks: a mark that has lost the other is passed over
    for piece in re.split(f"({_AS_TEXT}[^{_AS_TEXT}{_END}]*{_END}|[{_AS_TEXT}{_END}])", text):
        spelled, lone = piece[:1] == _AS_TEXT and len(piece) > 1, piece in (_AS_TEXT, _END)
        for at, part in _spelled(backend, piece[1:-1]) if spelled else [(0, "" if lone else piece)]:
            begin = position + spelled + at
            for token, left, right in _tokens_inside(backend, part, first and begin == 0, spelled):
                ids.append(token)
                starts.append(begin + left)
                ends.append(begin + right)
        position += len(piece)
    return Tokens(ids, starts, ends)


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
    backend.encode_special_tokens = spelled
    try:
        if first:
            encoding = backend.encode(piece, add_special_tokens=False)
            return [(token, left, right) for token, (left, right) in zip(encoding.ids, encoding.offsets, strict=True)]
        # some tokenizers put a space before a text's first word, so the piece is made to stand behind something else
        for lead in ("x" if piece[0].isspace() else "\n", "x", "!"):
            encoding = backend.encode(lead + piece, add_special_tokens=False)
            skip = len(backend.encode(lead, add_special_tokens=False).ids)
            if encoding.offsets[skip - 1][1] == len(lead):
                tokens = list(zip(encoding.ids, encoding.offsets, strict=True))[skip:]
                return [(token, left - len(lead), right - len(lead)) for token, (left, right) in tokens]
    finally:
        backend.encode_special_tokens = False
    raise ValueError(
        f"this tokenizer cannot encode a control token as plain text (near {piece[:20]!r}); remove it from the row"
    )


def num_before(tokenizer, text, tokens, at):
    """Return how many of the `tokens` of `text` stand before position `at`, or None where one straddles it, or where
    text[:at] alone has other tokens.

    Only what follows the last added token before `at` is tokenized again: text is cut there in any case.
    """
    count = bisect.bisect_left(tokens.starts, at)
    known = facts(tokenizer)
    if count and tokens.ends[count - 1] > at:  # an added token may swallow the spaces behind it
        return None
    anchor = next((index for index in range(count - 1, -1, -1) if tokens.ids[index] in known.added), None)
    begin = 0 if anchor is None else tokens.starts[anchor]
    alone = text[begin:at]
    if alone not in known.heads:
        if len(known.heads) >= _MOST_HEADS:
            known.heads.clear()
        known.heads[alone] = tokenize(tokenizer, alone).ids
    return count if known.heads[alone] == tokens.ids[anchor or 0 : count] else None


def control_as_text(tokenizer, messages, tools):
    """Return messages and tools with marks around the control tokens in their strings.

    In the assistant's words those are the special tokens; elsewhere also the other added tokens that the template writes,
    such as <tool_call>, which are the assistant's to say.
    """
    known = facts(tokenizer)
    marked = [
        _marked(message, known.control if message["role"] == "assistant" else known.template_control)
        for message in messages
    ]
    return marked, _marked(tools, known.template_control) if tools else None


OF_CONVERSATIONS = (
    "rows_merged",  # consecutive messages of the assistant became one turn
    "rows_with_nulls",  # nulls were removed from tool calls or tools
    "rows_without_thoughts",  # data.thoughts is drop, and there were some
    "rows_with_control",  # a special token stands in their words, as text
)


def counts_of(tokenizer, *conversations):
    """Return {one of OF_CONVERSATIONS: 1 or 0}: whether that is so of any of the Conversations of a row."""
    return {
        "rows_merged": int(any(one.merged for one in conversations)),
        "rows_with_nulls": int(any(one.nulls for one in conversations)),
        "rows_without_thoughts": int(any(one.dropped_thoughts for one in conversations)),
        "rows_with_control": int(any(_spells_control(tokenizer, one) for one in conversations)),
    }


def _spells_control(tokenizer, conversation):
    """Return whether the words of a Conversation hold a special token, which stays text."""
    pattern = facts(tokenizer).control
    said = [conversation.text or "", *(message["content"] for message in conversation.messages)]
    return pattern is not None and any(map(pattern.search, said))


def as_text(tokenizer, text):
    """Return `text` with marks around the special tokens in it."""
    return _marked(text, facts(tokenizer).control)


def _marked(value, pattern):
    """Return `value` (a string, or lists and dicts of them) with marks around every control token in its strings."""
    if isinstance(value, str):
        if _AS_TEXT in value or _END in value:
            raise ValueError("contains U+FDD0 or U+FDD1, which are not characters")
        return pattern.sub(f"{_AS_TEXT}\\g<0>{_END}", value) if pattern is not None else value
    if isinstance(value, dict):
        return {key: _marked(inner, pattern) for key, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner, pattern) for inner in value]
    return value


def identity(tokenizer):
    """Return, as JSON, all of `tokenizer` and its template that ids depend on."""
    backend = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    names = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return [backend, names, tokenizer.chat_template, sorted(chat.known_stops(tokenizer))]


@dataclass(frozen=True)
class Facts:
    """What is worth finding out once of a tokenizer and its template.

    closing: what is to be added to the text of a last answer and of a last call, see `chat.closing`. control: matches the
    special tokens; template_control: those, and other added tokens that the template writes. known_forms: what is left out of
    conversations of one form, as it is found out. heads: ids of what stands between the last added token and an answer, which
    is the same in every row of most templates.
    """

    stops: frozenset
    closing: tuple
    added: frozenset
    control: re.Pattern | None
    template_control: re.Pattern | None
    adds_bos: bool
    known_forms: dict = field(default_factory=dict)
    heads: dict = field(default_factory=dict)


def facts(tokenizer):
    key = (tokenizer.chat_template, len(tokenizer), chat.known_stops(tokenizer))
    cached = getattr(tokenizer, "_qlora_facts", None)
    if cached is None or cached[0] != key:
        added = list(tokenizer.added_tokens_decoder.values())
        template = chat.written(tokenizer)
        written = [token.content for token in added if token.content in template and not token.content.isspace()]
        special = [token.content for token in added if token.special]
        stops = frozenset(chat.stop_token_ids(tokenizer))
        found = Facts(
            stops,
            (chat.closing(tokenizer, stops, call=False), chat.closing(tokenizer, stops, call=True)),
            frozenset(tokenizer.added_tokens_decoder),
            _any_of(special),
            _any_of([*special, *written]),
            chat.adds_bos(tokenizer),
        )
        cached = tokenizer._qlora_facts = (key, found)
    return cached[1]


def _any_of(words):
    """Return a pattern that matches any of `words`, the longest first, or None for none."""
    return re.compile("|".join(map(re.escape, sorted(set(words), key=len, reverse=True)))) if words else None
