"""Conversation -> token ids and loss mask.

A row is trained as `chat`, and any server that applies the saved template, will meet it: the tokens that they make of the
prompt, which is tokenized alone, then the answer's own and the token that ends it. Where one rendering of the whole
conversation is that for each of its answers, the row is one Example. Where the template shows earlier turns otherwise once
later ones follow (Mistral's moves the system message, those of reasoning models leave old thoughts out), or an answer's first
characters would merge with the prompt's last, it becomes one Example an answer.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field, replace

from . import chat, words
from .conversation import Conversation
from .message import refuse_surrogates
from .tokens import as_text, control_as_text, facts, num_before, tokenize

IGNORE_INDEX = -100  # what cross_entropy skips

_MARK = "\ue000mark\ue000"  # private use: stands in no template
_MOST_FORMS = 1000  # of conversations that are remembered
_MOST_TOKENS = 2**20  # of one row in all the Examples that it becomes
_NEVER_STOPS = (
    "the chat template does not close the assistant's turn with a token that generation stops at, so the model would never "
    "learn to stop; give another data.chat_template"
)


@dataclass(frozen=True)
class Example:
    """`input_ids` and `labels` of equal length; labels are IGNORE_INDEX where nothing is trained.

    left_out: keys of the row's tools and messages whose text the template does not write, see `words.left_out`.
    """

    input_ids: list
    labels: list
    left_out: frozenset = field(default=frozenset(), compare=False)

    @property
    def num_trained(self):
        return sum(label != IGNORE_INDEX for label in self.labels)


def encode_prompt(tokenizer, messages, tools=None):
    """Return the token ids of what the model is shown before it answers; control tokens in `messages` stay text.

    Raises:
        ValueError: the template refuses the conversation, or leaves a message out; or a message is no text.
    """
    for message in messages:
        refuse_surrogates(f"the message of the {message['role']}", message.get("content") or "")
    talk = _Talk(tokenizer, *control_as_text(tokenizer, messages, tools))
    _refuse_lost_tools(talk)
    problem = talk.dropped(talk.messages, as_prompt=True)
    if problem is not None:
        raise ValueError(problem)
    return tokenize(tokenizer, talk.prompt_of(talk.messages)).ids


def encode(tokenizer, conversation: Conversation, train_on="assistant", mask_thoughts=False) -> list[Example]:
    """Return the Examples of one row: one, or one per answer, see above.

    train_on: "assistant" trains on every assistant message and the token that ends it; "last_assistant" on the last;
    "completion" on those of the row's completion, or after the last user message; "all" on every token. What a row says of
    a message itself goes before it. A row of plain text is trained whole, and ends with the tokenizer's end token.
    mask_thoughts: thoughts are seen, not trained; what closes them is.

    Raises:
        ValueError: nothing is to be trained, or the template leaves something out, so the mask would be a guess.
    """
    if conversation.text is not None:
        return [_encode_text(tokenizer, conversation.text)]
    chosen = _chosen(conversation, train_on)
    first_problem = None
    for messages in words.spellings(conversation.messages, tokenizer.chat_template):
        talk = _Talk(tokenizer, *control_as_text(tokenizer, messages, conversation.tools))
        how = _How(train_on == "all", mask_thoughts)
        try:
            _refuse_lost_tools(talk)
            return _together(talk, chosen, how) or _one_by_one(talk, chosen[-1:] if how.everything else chosen, how)
        except ValueError as problem:
            first_problem = first_problem or problem
    raise _with_remedy(tokenizer, conversation, first_problem)


def _refuse_lost_tools(talk):
    """Raise ValueError where the template does not name all of the row's tools before the first answer."""
    if not talk.tools:
        return
    first = next(
        (index for index, message in enumerate(talk.messages) if message["role"] == "assistant"), len(talk.messages)
    )
    shown, without = talk.prompt_of(talk.messages[:first]), replace(talk, tools=None).prompt_of(talk.messages[:first])
    for tool in talk.tools:
        name = tool["function"]["name"]
        if shown.count(name) <= without.count(name):
            raise ValueError(
                f"the chat template leaves the row's tools out ({name!r}); give data.chat_template, e.g. chatml"
            )


def _with_remedy(tokenizer, conversation, problem):
    """Return `problem`, with the remedy where it is the system message that the template refuses."""
    if conversation.messages[0]["role"] == "system" and str(problem).startswith("the chat template refuses"):
        with contextlib.suppress(ValueError):
            chat.render(tokenizer, conversation.messages[1:], tools=conversation.tools)
            return ValueError(f"{problem}; set data.system_as_user=true, which puts it before the first question")
    return problem


@dataclass(frozen=True)
class _How:
    """What of an Example is trained: every token, or answers with or without their thoughts."""

    everything: bool
    mask_thoughts: bool


@dataclass(frozen=True)
class _Talk:
    """A conversation, and what the tokenizer's template makes of it."""

    tokenizer: object
    messages: list
    tools: list | None

    def text_of(self, messages):
        return chat.render(self.tokenizer, messages, tools=self.tools)

    def prompt_of(self, messages):
        return chat.render(self.tokenizer, messages, add_generation_prompt=True, tools=self.tools)

    def dropped(self, messages, as_prompt):
        """Return what of `messages` the template leaves out, in words, or None; found out once for conversations of one form."""
        render = self.prompt_of if as_prompt else self.text_of
        marked, marks = words.with_marks(messages)
        known, form = facts(self.tokenizer).known_forms, repr((as_prompt, marked, self.tools))
        if form not in known:
            if len(known) >= _MOST_FORMS:
                known.clear()
            known[form] = words.dropped(render, marked, marks)
        found = known[form]
        return None if found is None else words.leaves_out(messages[found[0]], *found)

    def text_so_far(self, index):
        """Return the text of the conversation up to the answer `index`, with the token that ends it."""
        closing = facts(self.tokenizer).closing["tool_calls" in self.messages[index]]
        return self.text_of(self.messages[: index + 1]) + closing


def _together(talk, chosen, how):
    """Return [the Example of the whole conversation], or None where that is not what chat would show for each of its answers."""
    tokenizer, messages = talk.tokenizer, talk.messages
    text = talk.text_so_far(chosen[-1]) if chosen[-1] == len(messages) - 1 else talk.text_of(messages)
    if words.altered(text, messages) or talk.dropped(messages, as_prompt=False):
        return None
    tokens = tokenize(tokenizer, text)
    labels = [IGNORE_INDEX] * len(tokens.ids)
    for index in chosen:
        prompt = talk.prompt_of(messages[:index])
        begin = num_before(tokenizer, text, tokens, len(prompt)) if text.startswith(prompt) else None
        if begin is None:
            return None
        end = _stop(tokenizer, tokens, begin)
        if words.misses(text[len(prompt) : tokens.starts[end]], messages[index], index):
            return None
        # as it is rendered while it is the last message, so the model has to say it
        if index + 1 < len(messages) and not talk.text_so_far(index).startswith(text[: tokens.ends[end]]):
            return None
        begin += _num_masked(tokens, begin, text[len(prompt) :], len(prompt), messages[index], how)
        labels[begin : end + 1] = tokens.ids[begin : end + 1]
    left_out = frozenset(words.left_out(text, messages, talk.tools))
    return [Example(tokens.ids, _all(tokens.ids) if how.everything else labels, left_out)]


def _one_by_one(talk, chosen, how):
    """Return an Example for each answer: the prompt that chat would show, and the answer; raises ValueError."""
    examples, total = [], 0
    for index in chosen:
        examples.append(_answered(talk, index, how))
        total += len(examples[-1].input_ids)
        if total > _MOST_TOKENS and len(chosen) > 1:
            raise ValueError(
                f"each of its {len(chosen)} answers would be a training row of its own, with all that comes before it, more than "
                f"{_MOST_TOKENS:,} tokens in all: the chat template shows earlier turns differently once later ones follow; set "
                "data.train_on=last_assistant, or cut the conversation into shorter ones"
            )
    return examples


def _answered(talk, index, how):
    """Return the Example of the answer `index`: prompt and answer are tokenized apart."""
    tokenizer, before, message = talk.tokenizer, talk.messages[:index], talk.messages[index]
    prompt, rest = _as_in_chat(talk, index)
    problem = talk.dropped(before, as_prompt=True) or words.altered(prompt, before)
    if problem is not None:
        raise ValueError(problem)
    ids, tokens = tokenize(tokenizer, prompt).ids, tokenize(tokenizer, rest, first=False)
    end = _stop(tokenizer, tokens, 0)
    problem = words.misses(rest[: tokens.starts[end]], message, index)
    if problem is not None:
        raise ValueError(problem)
    begin = _num_masked(tokens, 0, rest, 0, message, how)
    answer = tokens.ids[: end + 1]
    labels = [IGNORE_INDEX] * (len(ids) + begin) + answer[begin:]
    left_out = frozenset(words.left_out(prompt + rest, talk.messages[: index + 1], talk.tools))
    return Example([*ids, *answer], _all([*ids, *answer]) if how.everything else labels, left_out)


def _as_in_chat(talk, index):
    """Return (what chat would show before the answer `index`, what the template writes for that answer from there on)."""
    before, answer = talk.messages[:index], talk.messages[index]
    prompt, text = talk.prompt_of(before), talk.text_so_far(index)
    if text.startswith(prompt):
        return prompt, text[len(prompt) :]
    marked = talk.text_of([*before, {**answer, "content": _MARK}])
    at = marked.rfind(_MARK)  # the last one: a question may hold anything
    if at < 0 or text[:at] != marked[:at]:
        what = "the thoughts of " if words.thoughts_and_words(answer)[0].strip() else ""
        raise ValueError(
            f"the chat template does not continue the prompt that chat shows with {what}message {index}; "
            f"{'remove them with data.thoughts=drop, or ' if what else ''}give another data.chat_template"
        )
    if re.search(r"<think>\s*$", prompt):  # the thought is open: what it says, be it nothing, and its end come first
        thoughts, said = words.thoughts_and_words(answer)
        rest = text[at:]
        if thoughts.strip() and rest.startswith(answer["content"]):  # the template keeps inline thoughts as they are
            rest = said.lstrip("\n") + rest[len(answer["content"]) :]
        return prompt, f"{thoughts.strip()}\n</think>\n\n{rest.lstrip(chr(10))}"
    space = "" if prompt[-1:].isspace() else text[len(text[:at].rstrip()) : at]
    return prompt, space + text[at:]


def _stop(tokenizer, tokens, begin):
    """Return the index of the first of the `tokens` from `begin` on at which generation stops; raises ValueError without one."""
    stops = facts(tokenizer).stops
    end = next((at for at in range(begin, len(tokens.ids)) if tokens.ids[at] in stops), None)
    if end is None:
        raise ValueError(_NEVER_STOPS)
    return end


def _num_masked(tokens, begin, region, offset, message, how):
    """Return how many tokens of an answer, whose text `region` begins at `offset`, are thoughts that are not trained."""
    if not how.mask_thoughts:
        return 0
    until = words.end_of_thoughts(region, message)
    return sum(start < offset + until for start in tokens.starts[begin:])


def _all(ids):
    return [IGNORE_INDEX, *ids[1:]]  # nothing stands before the first token to predict it from


def _chosen(conversation, train_on):
    """Return the indices of the assistant messages to train on; raises ValueError if there are none."""
    flags = dict(conversation.flags)
    if train_on == "all" and not all(flags.values()):
        raise ValueError(f"has {conversation.untrained} on a message, but data.train_on is all; set it to assistant")
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
        which = "assistant message" if flags.keys() >= {*answers} else f"message of data.train_on: {train_on}"
        raise ValueError(f"nothing to train on: every {which} has {conversation.untrained}")
    return trained


def _encode_text(tokenizer, text):
    ids = list(tokenize(tokenizer, as_text(tokenizer, text)).ids)
    if facts(tokenizer).adds_bos:
        ids.insert(0, tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return Example(ids, _all(ids))
