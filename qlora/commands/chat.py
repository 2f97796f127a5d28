"""qlora chat: talk to a run or a model."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from ..evaluation.intervals import in_words
from ..jobs.chosen_task import refuse_images
from ..jobs.class_scores import classes_of_text
from ..jobs.opened_model import open_subject, task_of_target
from ..jobs.routed import BASE
from ..system import signals
from ..system.devices import say_device
from ..system.errors import InputError, Interrupted
from ..system.events import note
from ..terminal import shown
from .open import open


@shown()
def chat(
    target, prompt, system=None, max_new_tokens=512, overrides=(), on_text=None, *, adapters=None, adapter=None
) -> str:
    """Return the greedy answer of a run or a model to one `prompt`; of a model with classes these, with their probabilities.

    target: a run folder, a model folder or a hub name. on_text(piece) is called with the text as it comes. adapters: more runs
    on the same base, {name: run folder}. adapter: the one that answers, "base" for the base alone; None: that of `target`.
    """
    task = task_of_target(target)
    if task.HAS_CLASSES:
        refuse_images(task, "a prompt")
        for option, given in {"--system": system, "--adapter": adapters or adapter}.items():
            if given:
                raise InputError(f"{option} is for models that answer with words; this one answers with classes")
        say_device()
        found = classes_of_text(open_subject(target, overrides), prompt)
        answer = "\n".join(f"{label}  {in_words(value)}" for label, value in found.items())
        (on_text or (lambda piece: None))(answer)
        return answer
    return open(target, adapters, adapter, overrides).answer(prompt, None, system, max_new_tokens, on_text)


@shown()
def talk(target, system=None, max_new_tokens=512, overrides=(), *, adapters=None, adapter=None):
    """Read prompts from stdin and print answers until end of file; the conversation goes on from turn to turn.

    Ctrl-C stops the answer that is being printed, what was printed of it stays in the conversation; at the prompt it ends
    the program. A message that cannot be answered is taken back. adapters, adapter: as `chat` takes them.
    """
    model = open(target, adapters, adapter, overrides)
    messages = _opening(system)
    interactive = sys.stdin.isatty()
    if interactive:
        note("Type a message; /new starts over, Ctrl-C stops an answer, Ctrl-D quits.")
        note("/adapter NAME|RUN|base switches, /load NAME RUN and /unload NAME change what is in memory.")
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
        elif command in ("/adapter", "/load", "/unload"):
            try:
                note(_route(model, command, argument.strip()))
            except InputError as error:  # the conversation goes on as it was
                note(f"qlora: {error}")
        elif prompt.strip():
            messages += _turn(model, [*messages, {"role": "user", "content": prompt}], max_new_tokens)


def _turn(model, messages, max_new_tokens):
    """Print the answer to `messages`; return what the turn adds to the conversation: the last of them and the answer."""
    said: list = []

    def on_text(piece):
        said.append(piece)
        print(piece, end="", flush=True)

    try:
        answer = model.answer(messages, max_new_tokens=max_new_tokens, on_text=on_text)
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


def _route(model, command, argument):
    """Do what /adapter, /load or /unload says; return what is so now, in words."""
    if command == "/load":
        name, _, path = argument.partition(" ")
        if not path.strip():
            raise InputError("/load NAME RUN: a name for the adapter, and the folder of its run")
        model.load(name, path.strip())
    elif command == "/unload":
        if not argument:
            raise InputError("/unload NAME: the name of the adapter")
        model.unload(argument)
        if argument == model.default:
            model.choose(BASE)
    elif argument:
        _switch(model, argument)
    return f"answering with {_in_words(model.default)}; loaded: {', '.join([*model.adapters, BASE])}"


def _switch(model, name):
    """Let what is called `name` answer, or the adapter of the run in that folder, which is loaded if it is new."""
    if name not in (*model.adapters, BASE):
        folder, loaded = name, model.find(name)
        if loaded is None and not Path(folder).exists():
            there = ", ".join([*model.adapters, BASE])
            raise InputError(f"no adapter called {name!r} is loaded ({there}), and no run at {folder}")
        name = loaded or folder
        if loaded is None:
            model.load(folder, folder)
    model.choose(name)


def _in_words(name):
    return "the base model alone" if name == BASE else name


def _opening(system):
    return [] if system is None else [{"role": "system", "content": system}]
