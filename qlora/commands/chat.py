"""qlora chat: talk to a run or a model."""

from __future__ import annotations

import sys

from .. import generate
from ..data.chat import encode_prompt
from ..errors import InputError
from .subject import open_subject, switch


def chat(target, prompt, system=None, max_new_tokens=512, overrides=(), on_text=None) -> str:
    """Return the greedy answer of a run or a model to one `prompt`.

    target: a run folder, a model folder or a hub name. on_text(piece) is called with the text as it comes.
    """
    subject = open_subject(target, overrides)
    return _answer(subject, [*_opening(system), {"role": "user", "content": prompt}], max_new_tokens, on_text)


def talk(target, system=None, max_new_tokens=512, overrides=()):
    """Read prompts from stdin and print answers until end of file; the conversation goes on from turn to turn."""
    subject = open_subject(target, overrides)
    messages = _opening(system)
    interactive = sys.stdin.isatty()
    if interactive:
        print("Type a message; /new starts over, /adapter RUN|none switches, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            prompt = input("> " if interactive else "")
        except EOFError:
            return
        command, _, argument = prompt.strip().partition(" ")
        if command == "/new":
            messages = _opening(system)
        elif command == "/adapter":
            try:
                print(_switch(subject, argument.strip()), file=sys.stderr)
            except InputError as error:  # the conversation goes on as it was
                print(f"qlora: {error}", file=sys.stderr)
        elif prompt.strip():
            messages.append({"role": "user", "content": prompt})
            answer = _answer(subject, messages, max_new_tokens, _print_piece)
            print()
            messages.append({"role": "assistant", "content": answer})


def _switch(subject, name):
    """Make the adapter of run `name` the one that answers ("none": the base alone); return what is so now, in words."""
    if name:
        switch(subject, None if name == "none" else name)
    listed = ", ".join(["none", *(str(one) for one in subject.voices if one is not None)])
    return f"answering: {subject.speaking or 'the base alone'}; known: {listed}"


def _opening(system):
    return [] if system is None else [{"role": "system", "content": system}]


def _print_piece(text):
    print(text, end="", flush=True)


def _answer(subject, messages, max_new_tokens, on_text):
    try:
        prompt = encode_prompt(subject.tokenizer, messages)
    except ValueError as error:
        raise InputError(str(error)) from None
    return generate.stream(
        subject.model, subject.tokenizer, prompt, subject.stops, max_new_tokens, on_text or (lambda piece: None)
    ).strip()
