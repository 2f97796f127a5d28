"""What a person sees: listens to what verbs and computations emit (system/events.py), and prints it."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar

from ..system import events
from ..system.quiet_libraries import hushed

_is_decided = ContextVar("is_decided", default=False)  # whether and how verbs are shown


@contextlib.contextmanager
def shown(results=True, steps=False):
    """Show on the terminal what is emitted in the block, or in the function that this decorates.

    Notes and bars go to stderr, results, where they are wanted, to stdout. The outermost block decides for those in it.
    steps: those of a training too; without them no library of models is imported, which takes seconds and may be broken.
    """
    if _is_decided.get():
        yield
        return
    from . import bars, lines, tables  # rich; here, so that `qlora.quiet` does without

    with bars.Bars() as live:
        listeners = [lines.hear, live.hear, *([tables.hear] if results else [])]
        if steps:
            from . import training

            listeners.append(training.Steps(live).hear)
        with _decided(), events.heard_by(*listeners):
            yield


@contextlib.contextmanager
def quiet():
    """Let the verbs that are called in the block print nothing, nor the libraries that they use; they return what they found,
    and raise what is wrong.

    with qlora.quiet():
        report = qlora.inspect_data(recipe)
    """
    with _decided(), hushed():
        yield


@contextlib.contextmanager
def _decided():
    token = _is_decided.set(True)
    try:
        yield
    finally:
        _is_decided.reset(token)
