"""What happens, told to whoever listens. Computations emit; the terminal, files and pages listen.

An event is any object; who emits a kind of event defines it, as a frozen dataclass. Who listens is known by context, so
no function passes listeners on, and two runs in two threads have their own.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass

_listeners: ContextVar[tuple] = ContextVar("listeners", default=())


def emit(event):
    """Hand `event` to everyone who listens, in the order in which they began to."""
    for listener in _listeners.get():
        listener(event)


@contextlib.contextmanager
def heard_by(*listeners):
    """Let `listeners`, functions of an event, hear what is emitted in the block, beside those who already do."""
    token = _listeners.set((*_listeners.get(), *listeners))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextlib.contextmanager
def unheard():
    """Let nobody hear what is emitted in the block: another process says it."""
    token = _listeners.set(())
    try:
        yield
    finally:
        _listeners.reset(token)


@dataclass(frozen=True)
class Note:
    """A line for a person, which no program would read: what was found, chosen or left out."""

    text: str


def note(text):
    emit(Note(str(text)))


@dataclass(frozen=True)
class Found:
    """What a verb has found and shown, before what may still end it with an error: a full disk, a gate. --json prints it then."""

    value: dict


@contextlib.contextmanager
def notes_once():
    """Say no note of the block twice, for whoever goes the same way several times."""
    said: set[str] = set()
    listeners = _listeners.get()

    def hear(event):
        if isinstance(event, Note):
            if event.text in said:
                return
            said.add(event.text)
        for listener in listeners:
            listener(event)

    token = _listeners.set((hear,))
    try:
        yield
    finally:
        _listeners.reset(token)


@dataclass(frozen=True)
class Progress:
    """Some work, of which `done` of `total` is done; total is None where nobody knows.

    unit: of both: "bytes" or "rows", or "" where there is no total. detail: more in words, such as "1,200 rows".
    ended: nothing more comes of it, well or not.
    """

    what: str
    done: float = 0
    total: float | None = None
    unit: str = ""
    detail: str = ""
    ended: bool = False


@contextlib.contextmanager
def progress(what, total=None, unit=""):
    """Emit the Progress of the block: its begin and its end; yield advance(count, detail=""), which emits the rest."""
    done = 0

    def advance(count, detail=""):
        nonlocal done
        done += count
        emit(Progress(what, done, total, unit, detail))

    emit(Progress(what, 0, total, unit))
    try:
        yield advance
        done = done if total is None else total
    finally:
        emit(Progress(what, done, total, unit, ended=True))
