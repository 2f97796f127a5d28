"""qlora chat without --prompt: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path

from ..evaluation.sampling import Sampling
from ..jobs.opening.routed import BASE
from ..jobs.talking.dialogue import Dialogue
from ..system import signals
from ..system.errors import InputError, Interrupted
from ..system.events import note
from ..terminal import shown
from .open import open


@shown()
def talk(target, system=None, max_new_tokens=512, overrides=(), *, adapters=None, adapter=None, **sampling):
    """Read prompts from stdin and print answers until end of file; the conversation goes on from turn to turn.

    Ctrl-C stops the answer that is being printed, what was printed of it stays in the conversation; at the prompt it ends
    the program. A message that cannot be answered is taken back. What begins with a slash is a command, see `Talk`. The other
    arguments are those of `chat`.
    """
    chosen = Sampling.of(max_new_tokens=max_new_tokens, **sampling)
    with open(target, adapters, adapter, overrides) as model:
        conversation = Talk(model, Dialogue(system), chosen)
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (input() then has arrows, and what was typed before)
            note("Type a message; /help shows the commands, Ctrl-C stops an answer, Ctrl-D quits.")
        while True:
            try:
                line = input("> " if interactive else "")
            except EOFError:
                return
            except (KeyboardInterrupt, Interrupted) as stopped:
                if not signals.is_ctrl_c(stopped):
                    raise
                return
            try:
                conversation.hear(line)
            except InputError as error:  # the conversation goes on as it was
                note(f"qlora: {error}")


class Talk:
    """What is typed, line by line: messages and commands. A command is a method that COMMANDS names; its documentation is its
    line in /help, arguments and a colon first."""

    def __init__(self, model, dialogue, sampling):
        """model: a Routed."""
        self.model, self.dialogue, self.sampling = model, dialogue, sampling

    def hear(self, line):
        """Do what a line says; raises InputError for what cannot be done, and has done nothing then."""
        if not line.strip():
            return
        if not line.startswith("/"):
            message = line.lstrip()
            self._say(message if message.startswith("/") else line)
            return
        name, _, argument = line[1:].strip().partition(" ")
        if name not in COMMANDS:
            there = ", ".join(f"/{one}" for one in COMMANDS)
            raise InputError(f"no command /{name}; there are {there}. A message may begin with a slash after a space")
        COMMANDS[name](self, argument.strip())

    def _say(self, question):
        """Print the answer to `question`, after what was said before, and keep both."""
        answer = self._answered(self.dialogue.messages(question))
        if answer is not None:
            self.dialogue.turns.append((question, answer))

    def _answered(self, messages, adapter=None):
        """Print the answer to `messages`, and how fast it came; return it, None where it was stopped at once."""
        said: list = []
        paces: list = []

        def on_text(piece):
            said.append(piece)
            print(piece, end="", flush=True)

        try:
            answer = self.model.answer(
                messages, adapter, on_text=on_text, on_done=paces.append, **self.sampling.in_effect()
            )
        except (KeyboardInterrupt, Interrupted) as stopped:
            if not signals.is_ctrl_c(stopped):
                raise
            signals.answered()
            answer = "".join(said).strip() or None
            on_one_line = answer is not None and sys.stdout.isatty()
            print(" [stopped]", end="" if on_one_line else "\n", file=sys.stderr, flush=True)
        if answer is not None:
            print("" if answer else "(an empty answer)")
        for pace in paces:
            note(_in_words(pace))
        return answer

    def help(self, _):
        """show this"""
        for name, command in COMMANDS.items():
            arguments, _, does = command.__doc__.rpartition(": ")
            note(f"  {f'/{name} {arguments}':24} {does}".rstrip())
        note("  Ctrl-C stops an answer; at the prompt Ctrl-C or Ctrl-D quits")

    def reset(self, _):
        """start over; the system message stays"""
        self.dialogue.turns.clear()
        note("started over")

    def undo(self, _):
        """take back the last question and its answer"""
        note(f"taken back: {self.dialogue.undo()}")

    def system(self, text):
        """TEXT: set the system message; without TEXT, none"""
        self.dialogue.system = text or None
        note("the system message is set" if text else "no system message")

    def save(self, file):
        """FILE.jsonl: add the conversation to FILE, as a row to train on"""
        if not file:
            raise InputError("/save FILE.jsonl: the file that gets the conversation")
        self.dialogue.save(file)
        note(f"saved to {file}; see it with: qlora data RECIPE data.train={shlex.quote(file)}")

    def set(self, text):
        """NAME=VALUE: change how answers are drawn, or show it"""
        if text:
            self.sampling = self.sampling.typed(text)
        note(str(self.sampling))
        if self.sampling.without_effect:
            note(self.sampling.without_effect)

    def base(self, _):
        """show the base's answer to the last question"""
        if not self.model.adapters:
            raise InputError(f"{self.model.name} is a model by itself, with no adapter that could be left out")
        if not self.dialogue.turns:
            raise InputError("no question was asked yet")
        before = Dialogue(self.dialogue.system)
        *before.turns, (question, _) = self.dialogue.turns
        self._answered(before.messages(question), BASE)

    def adapter(self, name):
        """NAME|RUN|base: choose who answers; without a name, this run"""
        if name:
            _switch(self.model, name)
        elif self.model.default == BASE and self.model.adapters:
            self.model.choose(self.model.adapters[0])
        self._note_who()

    def load(self, argument):
        """NAME RUN: load the adapter of another run"""
        name, _, path = argument.partition(" ")
        if not path.strip():
            raise InputError("/load NAME RUN: a name for the adapter, and the folder of its run")
        self.model.load(name, path.strip())
        self._note_who()

    def unload(self, name):
        """NAME: take an adapter out of memory"""
        if not name:
            raise InputError("/unload NAME: the name of the adapter")
        self.model.unload(name)
        if name == self.model.default:
            self.model.choose(BASE)
        self._note_who()

    def _note_who(self):
        default = self.model.default
        who = "the base model alone" if default == BASE else default
        note(f"answering with {who}; loaded: {', '.join([*self.model.adapters, BASE])}")


COMMANDS = {
    name: vars(Talk)[name]
    for name in ("help", "reset", "undo", "save", "system", "set", "base", "adapter", "load", "unload")
}


def _in_words(pace):
    cut_off = "; cut off there, /set max_new_tokens= allows more" if pace.cut_off else ""
    return f"[{pace.num_tokens:,} tokens, {pace.tokens_per_second:.1f} tokens/s{cut_off}]"


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
