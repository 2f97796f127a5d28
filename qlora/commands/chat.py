"""qlora chat: talk to a run or a model."""

from __future__ import annotations

import signal
import sys

from .. import base_model
from ..data.masked_examples import encode_prompt
from ..evaluation import generate
from ..evaluation.intervals import in_words
from ..jobs.chosen_task import refuse_classes, refuse_images
from ..jobs.class_scores import classes_of_text
from ..jobs.opened_model import open_subject, switch
from ..system import signals
from ..system.devices import say_device
from ..system.errors import InputError, Interrupted
from ..system.events import note
from ..terminal import shown


@shown()
def chat(target, prompt, system=None, max_new_tokens=512, overrides=(), on_text=None) -> str:
    """Return the greedy answer of a run or a model to one `prompt`; of a model with classes these, with their probabilities.

    target: a run folder, a model folder or a hub name. on_text(piece) is called with the text as it comes.
    """
    say_device()
    subject = open_subject(target, overrides)
    if base_model.task_of(subject.model).HAS_CLASSES:
        refuse_images(base_model.task_of(subject.model), "a prompt")
        if system is not None:
            raise InputError("--system is for models that answer with words; this one answers with classes")
        answer = "\n".join(f"{label}  {in_words(value)}" for label, value in classes_of_text(subject, prompt).items())
        (on_text or (lambda piece: None))(answer)
        return answer
    return _answer(subject, [*_opening(system), {"role": "user", "content": prompt}], max_new_tokens, on_text)


@shown()
def talk(target, system=None, max_new_tokens=512, overrides=()):
    """Read prompts from stdin and print answers until end of file; the conversation goes on from turn to turn.

    Ctrl-C stops the answer that is being printed, what was printed of it stays in the conversation; at the prompt it ends
    the program. A message that cannot be answered is taken back.
    """
    say_device()
    subject = open_subject(target, overrides)
    refuse_images(base_model.task_of(subject.model), "a conversation")
    refuse_classes(base_model.task_of(subject.model), "a conversation", "; classify a text with --prompt TEXT")
    messages = _opening(system)
    interactive = sys.stdin.isatty()
    if interactive:
        note("Type a message; /new starts over, /adapter RUN|none switches, Ctrl-C stops an answer, Ctrl-D quits.")
    while True:
        try:
            prompt = input("> " if interactive else "")
        except EOFError:
            return
        except (KeyboardInterrupt, Interrupted) as stopped:
            if not _is_ctrl_c(stopped):
                raise
            return
        command, _, argument = prompt.strip().partition(" ")
        if command == "/new":
            messages = _opening(system)
        elif command == "/adapter":
            try:
                note(_switch(subject, argument.strip()))
            except InputError as error:  # the conversation goes on as it was
                note(f"qlora: {error}")
        elif prompt.strip():
            messages += _turn(subject, [*messages, {"role": "user", "content": prompt}], max_new_tokens)


def _turn(subject, messages, max_new_tokens):
    """Print the answer to `messages`; return what the turn adds to the conversation: the last of them and the answer."""
    said: list = []

    def on_text(piece):
        said.append(piece)
        print(piece, end="", flush=True)

    try:
        answer = _answer(subject, messages, max_new_tokens, on_text)
    except InputError as error:
        note(f"qlora: {error}")
        return []
    except (KeyboardInterrupt, Interrupted) as stopped:
        if not _is_ctrl_c(stopped):
            raise
        signals.answered()
        print(" [stopped]", file=sys.stderr, flush=True)
        answer = "".join(said).strip()
        if not answer:
            return []
    print()
    return [messages[-1], {"role": "assistant", "content": answer}]


def _is_ctrl_c(stopped):
    """True if a KeyboardInterrupt or Interrupted came from SIGINT."""
    return getattr(stopped, "number", signal.SIGINT) == signal.SIGINT


def _switch(subject, name):
    """Make the adapter of run `name` the one that answers ("none": the base alone); return what is so now, in words."""
    if name:
        switch(subject, None if name == "none" else name)
    listed = ", ".join(["none", *(str(one) for one in subject.voices if one is not None)])
    return f"answering with {subject.speaking or 'the base model alone'}; loaded: {listed}"


def _opening(system):
    return [] if system is None else [{"role": "system", "content": system}]


def _answer(subject, messages, max_new_tokens, on_text):
    try:
        prompt = encode_prompt(subject.tokenizer, messages)
    except ValueError as error:
        raise InputError(str(error)) from None
    return generate.stream(
        subject.model,
        subject.tokenizer,
        prompt,
        subject.stops,
        max_new_tokens,
        on_text or (lambda piece: None),
        lambda limit: note(f"\nanswer cut off: all {limit:,} positions of the model are used"),
    ).strip()
