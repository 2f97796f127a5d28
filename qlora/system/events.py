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


@dataclass(frozen=True)
class Progress:
    """Some work, of which `done` of `total` is done; total is None where nobody knows. unit: "rows", "bytes", "share"."""

    what: str
    done: float
    total: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Note:
    """A line for a person, which no program would read: what was found, chosen or left out. kind: what it is about."""

    text: str
    kind: str = ""
    is_warning: bool = False


@contextlib.contextmanager
def progress(what, total=None, unit=""):
    """Emit the Progress of the block: its begin and its end; yield advance(count), which emits the rest."""
    done = 0

    def advance(count):
        nonlocal done
        done += count
        emit(Progress(what, done, total, unit))

    emit(Progress(what, 0, total, unit))
    yield advance
    emit(Progress(what, done if total is None else total, total, unit))
