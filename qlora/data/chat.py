"""Conversation -> token ids and loss mask, by the model's own chat template, which is never edited.

The string that training sees is the string that `chat`, and any server that applies the saved template, will make:
the conversation is rendered once, tokenized once without added special tokens (so no second BOS), and the trained
spans are found by prefix differences of rendered strings. A trained span is an assistant's words and the token that
ends the turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jinja2

from ..errors import InputError

IGNORE_INDEX = -100  # what cross_entropy skips

# For base models that have no template. Each turn ends with the tokenizer's own end token: always one token, and
# always one that generation stops at (ChatML's <|im_end|> would be six ordinary tokens in most vocabularies).
FALLBACK_TEMPLATE = """\
{{ bos_token if ADD_BOS else '' }}{% for message in messages %}\
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

_MARK = "\ue000mark\ue000"  # private use: stands in no template
_PROBE = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "WORDS"}]


@dataclass(frozen=True)
class Example:
    """`input_ids` and `labels` of equal length; labels are IGNORE_INDEX where nothing is trained."""

    input_ids: list
    labels: list

    @property
    def num_trained(self):
        return sum(label != IGNORE_INDEX for label in self.labels)


def set_template(tokenizer, chat_template):
    """Give `tokenizer` the template file `chat_template`, or its own, or the fallback; return which, in words.

    Raises:
        InputError: the file is missing, or is not a Jinja template.
    """
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
            render(tokenizer, _PROBE)
        except (OSError, ValueError) as error:
            raise InputError(f"data.chat_template {chat_template}: {error}") from None
        return f"from {chat_template}"
    if tokenizer.chat_template:
        return "the model's own"
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has no chat template and no end token; give data.chat_template")
    adds_bos = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = FALLBACK_TEMPLATE.replace("ADD_BOS", str(adds_bos))
    return "built in (the model has none): <|role|> headers, turns closed by the end token"


def render(tokenizer, messages, add_generation_prompt=False):
    """Return the template's string for `messages`.

    Raises:
        ValueError: the template refuses the conversation; says why.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from None


def encode(tokenizer, messages, train_on="assistant"):
    """Return the Example of one conversation.

    train_on: "assistant" trains on every assistant message and the token that ends it; "all" on every token.

    Raises:
        ValueError: the template rewrites earlier turns or leaves the answer out, so the mask would be a guess.
    """
    text = _conversation(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    spans = list(_assistant_spans(tokenizer, messages, text))
    if train_on == "all":
        return Example(ids, [IGNORE_INDEX, *ids[1:]])  # nothing stands before the first token to predict it from
    labels = [IGNORE_INDEX] * len(ids)
    stops = stop_token_ids(tokenizer)
    for start, words_end, bound in spans:
        stopped = False
        for index, (left, right) in enumerate(offsets):
            if right <= start or left >= bound or stopped:
                continue  # what the template puts after the end of the turn (a newline) is not the assistant's
            if left < start and ids[index] in tokenizer.added_tokens_decoder:
                continue  # the header's last token, which swallows spaces that the answer begins with (Phi-3)
            labels[index] = ids[index]
            stopped = left >= words_end and ids[index] in stops
        if not stopped:
            raise ValueError(
                "the chat template does not close the assistant's turn with a token that generation stops at, so the "
                "model would never learn to stop; give another data.chat_template"
            )
    return Example(ids, labels)


def _conversation(tokenizer, messages):
    """Return the string to train on: the template's, which for a single answer begins with what chat will show.

    Some templates render a question otherwise once its answer follows: Mistral's v0.3 leaves the system message out, and
    those of reasoning models open the answer with <think> in a prompt only. The prompt is what the model will see, so
    for a single answer the prompt it is.
    """
    text = render(tokenizer, messages)
    if sum(message["role"] == "assistant" for message in messages) == 1:
        prompt = render(tokenizer, messages[:-1], add_generation_prompt=True)
        marked = render(tokenizer, [*messages[:-1], {**messages[-1], "content": _MARK}])
        at = marked.find(_MARK)
        if at >= 0 and text[:at] == marked[:at] and not text.startswith(prompt):
            space = "" if prompt[-1:].isspace() else text[len(text[:at].rstrip()) : at]
            return prompt + space + text[at:]
    return text


def _assistant_spans(tokenizer, messages, text):
    """Yield (start of the turn, end of the words, where the next message begins) in `text` for each assistant message."""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:index], add_generation_prompt=True)
        words = message["content"].strip()
        at = text.find(words, len(prompt))
        if not text.startswith(prompt) or at < 0:
            raise ValueError(
                f"the chat template renders what comes before message {index}, or the message itself, differently in the "
                "whole conversation than in chat; give another data.chat_template"
            )
        yield len(prompt), at + len(words), _start_of_message(tokenizer, messages, index + 1, text)


def _start_of_message(tokenizer, messages, index, text):
    """Return where the content of message `index` begins in `text`, or the end of `text` if there is no such message.

    Found with a mark in its place: the content itself may stand earlier too ("a" stands in "<|im_start|>").
    """
    if index == len(messages):
        return len(text)
    marked = render(tokenizer, [*messages[:index], {**messages[index], "content": _MARK}])
    start = marked.find(_MARK)
    if start < 0 or not text.startswith(marked[:start]):
        raise ValueError(
            f"the chat template renders what comes before message {index} by what it says; give another one"
        )
    return start


def stop_token_ids(tokenizer, generation_config=None):
    """Return the set of ids at which generation ends: the tokenizer's end token, those of `generation_config`, and
    the special token with which the template closes an assistant turn."""
    ids = {tokenizer.eos_token_id} - {None}
    if generation_config is not None and generation_config.eos_token_id is not None:
        listed = generation_config.eos_token_id
        ids |= set(listed) if isinstance(listed, (list, tuple)) else {listed}
    return ids | _turn_end_ids(tokenizer)


def _turn_end_ids(tokenizer):
    key = (tokenizer.chat_template, len(tokenizer))
    cached = getattr(tokenizer, "_qlora_turn_end", None)
    if cached is None or cached[0] != key:
        cached = tokenizer._qlora_turn_end = (key, _find_turn_end_ids(tokenizer))
    return cached[1]


def _find_turn_end_ids(tokenizer):
    """Render a probe conversation and return the first special token after the assistant's word, as a set of 0 or 1."""
    try:
        tail = render(tokenizer, _PROBE).rpartition("WORDS")[2]
    except ValueError:
        return set()
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    found = [token for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if token in special]
    return set(found[:1])
