"""One question to a base and its tuned model, whose answers come side by side, in an order drawn by chance."""

from __future__ import annotations

import contextvars
import dataclasses
import queue
import random
import threading

from ... import methods
from ...evaluation.sampling import Sampling
from ...system.errors import InputError
from ..opening import routed
from .votes import BASE, SIDES, TUNED, Votes


@dataclasses.dataclass
class Question:
    """What was asked, and what has been said to it. left: BASE or TUNED, who answers there. answers: {BASE or TUNED: text} of
    those who are done. stopped: is set to stop the model."""

    prompt: str
    system: str | None
    sampling: Sampling
    left: str
    blind: bool
    answers: dict
    voted: bool = False
    stopped: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def order(self):
        """Who answers on the left, and who on the right."""
        return (self.left, TUNED if self.left == BASE else BASE)

    @property
    def is_answered(self):
        return len(self.answers) == len(SIDES)


class SideBySide:
    """A Routed and what is voted on it. name: of the adapter that answers as the tuned model."""

    def __init__(self, model, file):
        """file: of the votes.

        Raises:
            InputError: there is nothing to compare, as the model has no adapter, or one that cannot be taken out.
        """
        self.model, self.name = model, model.default
        if self.name == routed.BASE:
            why = "answers as its base" if model.adapters else "is a model by itself, with no base beside it"
            raise InputError(f"{model.name} {why}; --web compares a run with its base. Leave --web out to talk to it")
        model.choose(routed.BASE)  # refused where training has changed the base's own weights
        model.choose(self.name)
        self.votes = Votes(file, methods.weight_hashes(model.folder_of(self.name)))

    def ask(self, prompt, system, sampling, blind=True):
        """Return a Question. blind: draw who answers on the left; else the base.

        Raises:
            InputError: nothing is asked.
        """
        if not prompt.strip():
            raise InputError("type a question first")
        left = random.choice((BASE, TUNED)) if blind else BASE
        return Question(prompt, system or None, sampling, left, blind, {})

    def answers(self, question):
        """Yield (side, text so far) as the answers come, the left one first, until `question.stopped` is set or it is closed.

        Raises:
            InputError: the question cannot be answered.
        """
        names = {BASE: routed.BASE, TUNED: self.name}
        for side, who in zip(SIDES, question.order, strict=True):
            said = ""

            def answer(on_text, name=names[who]):
                settings = question.sampling.in_effect()
                return self.model.answer(question.prompt, name, question.system, on_text=on_text, **settings)

            for said in _streamed(answer, question.stopped):
                yield side, said
            if question.stopped.is_set():
                return
            question.answers[who] = said

    def vote(self, question, better):
        """Write down which answer is better: "left", "right" or TIE.

        Raises:
            InputError: there are not two answers, or it was voted on already; or it cannot be written.
        """
        if question is None or not question.is_answered:
            raise InputError("there are not two answers yet")
        if not question.blind:
            raise InputError("only blind answers are voted on")
        if question.voted:
            raise InputError("this question was voted on; ask the next one")
        asked = {"run": self.model.name, "adapter": self.name, "prompt": question.prompt, "system": question.system}
        asked |= question.sampling.in_effect()
        self.votes.add(asked, question.left, question.answers, better)
        question.voted = True


class _Stopped(Exception):
    """Nobody reads on."""


def _streamed(answer, stopped):
    """Yield the text so far of answer(on_text) -> text, which runs in a thread of its own, and at last the text itself.

    stopped: a threading.Event that ends it, which is set where this is closed in between. The thread has ended then.
    """
    pieces: queue.Queue = queue.Queue()

    def on_text(piece):
        if stopped.is_set():
            raise _Stopped
        pieces.put((None, piece))

    def work():
        try:
            pieces.put(("done", answer(on_text)))
        except BaseException as error:
            pieces.put(("failed", error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
    thread.start()
    said, is_whole = "", False
    try:
        while not is_whole:
            how, value = pieces.get()
            is_whole = how == "done"
            if isinstance(value, _Stopped):
                return
            if how == "failed":
                raise value
            said = value if is_whole else said + value
            yield said
    finally:
        if not is_whole:
            stopped.set()
        thread.join()
