"""SIGINT and SIGTERM: raised at once, or recorded where the current step is finished and saved first. And the end of the process
that started this one, which counts as SIGTERM where it asks for that."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

from . import launched
from .errors import Interrupted


class Stop:
    """Whether to stop. number: of the signal that asked for it, or None."""

    number: int | None = None

    def agree(self, numbers=()):
        """Return the sums of `numbers` over all processes of a training, of which this is the only one here."""
        return list(numbers)


ENDS_WITH_STDIN = "QLORA_ENDS_WITH_STDIN"  # is set for a command that is to end once its stdin does
BY_TORCHRUN = "TORCHELASTIC_RUN_ID"  # is set by it, and by accelerate launch, in the processes that they start
_BOTH = 0.5  # seconds in which a signal that was sent to two processes has come to both
_LOOKED_EVERY = 1.0  # seconds
_PASSED_ON = 5.0  # seconds in which a launcher has passed it on, that it got as its processes did
_came = False  # a signal, in this process
_owner = None  # the process that handles them; not its forks
_leaves = False  # at the second: whether that process ends
_one_of_several = False  # processes of a launcher
_since = 0.0  # when the first came
_before: dict = {}  # number -> what was done before
_dropping = False  # _on_dropped is at work
_stdin_ended = False  # and SIGTERM was sent for that
_noted: Stop | None = None  # where the first is written instead of being raised


@contextlib.contextmanager
def handled(leaves=False):
    """Raise Interrupted at the first SIGINT or SIGTERM in the block; ignore SIGHUP.

    leaves: at the second the process ends, with those that it began; of several processes only some seconds after the first,
    because a scheduler tells all processes of a job, and torchrun passes on to its own what it gets. Without it, in a program
    or notebook of somebody else, the second does what it did before the block. What the process was started to ignore stays
    ignored (nohup, a shell's background jobs). Off the main thread, and within another such block, nothing changes.
    """
    global _came, _owner, _leaves, _before, _one_of_several
    if _owner == os.getpid() or threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted: dict = {signal.SIGINT: _on_signal, signal.SIGTERM: _on_signal}
    if hasattr(signal, "SIGHUP"):
        wanted[signal.SIGHUP] = signal.SIG_IGN
    before = {number: signal.getsignal(number) for number in wanted}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    hook = sys.unraisablehook
    for number in before:
        signal.signal(number, wanted[number])
    _owner, _came, _leaves, _before = os.getpid(), False, leaves, before
    _one_of_several = leaves and launched.several() is not None
    sys.unraisablehook = lambda dropped: _on_dropped(dropped, hook)
    if leaves and BY_TORCHRUN in os.environ:
        threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
    if leaves and os.environ.pop(ENDS_WITH_STDIN, None):  # not for what this process starts
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        yield
    finally:
        _owner, sys.unraisablehook = None, hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def noted():
    """Yield a Stop: the first signal in the block is written into it, not raised."""
    global _noted
    with handled():
        _noted = Stop()
        try:
            yield _noted
        finally:
            _noted = None


@contextlib.contextmanager
def raised():
    """Raise a signal in the block at once, where `noted` would write it down: nothing of what the block does is kept."""
    global _noted
    before, _noted = _noted, None
    try:
        if before is not None and before.number is not None:
            raise Interrupted(before.number)
        yield
    finally:
        _noted = before


def answered():
    """Mark the raised signal as handled: the next one counts as the first again."""
    global _came
    _came = False


def is_ctrl_c(stopped):
    """True if a KeyboardInterrupt or Interrupted came from SIGINT."""
    return getattr(stopped, "number", signal.SIGINT) == signal.SIGINT


def _end_with_stdin():
    """Send this process SIGTERM once its stdin ends: the one that started it has closed the pipe, or was killed.

    Ctrl-C in a terminal and schedulers send a signal to both. Then this is none: at a second one nothing would be saved.
    """
    global _stdin_ended
    with contextlib.suppress(OSError):  # closed
        while os.read(0, 1 << 16):
            pass
    time.sleep(_BOTH)
    if not _came:
        _stdin_ended = True
        os.kill(os.getpid(), signal.SIGTERM)


def _end_with_launcher(parent):
    """Send this process SIGTERM once its launcher was killed: nobody else would end it, and it would hold its card."""
    while os.getppid() == parent:
        time.sleep(_LOOKED_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)


def _on_signal(number, frame):
    global _came, _since, _stdin_ended
    if _stdin_ended and number == signal.SIGTERM:
        _stdin_ended = False
        if _came:  # another was sent before, which the main thread had no time for
            return
    if _dropping:  # what is raised here is dropped too: under load the timer may be faster than the start of its thread
        _send_later(number)
        return
    again = _came and os.getpid() == _owner
    if again and _one_of_several and time.monotonic() < _since + _PASSED_ON:
        return
    if again and _leaves:
        _leave(128 + number)
    elif again and callable(_before[number]):
        _before[number](number, frame)
    elif again or os.getpid() != _owner:  # a fork: ended as it would be without us
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    else:
        _came, _since = True, time.monotonic()
        if _noted is None:
            raise Interrupted(number)
        _noted.number = number


def _leave(code):
    """End now, whatever is going on, with the processes begun here; what is half written is named so, and replaced later."""
    try:
        import psutil

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    finally:
        os._exit(code)


def _on_dropped(dropped, hook):
    """Have a signal come again that was raised where Python drops exceptions: in `__del__`, in a weak reference's end."""
    global _came, _dropping
    if isinstance(dropped.exc_value, Interrupted):
        _dropping = True
        try:
            _came = False
            _send_later(dropped.exc_value.number)
        finally:
            _dropping = False
    else:
        hook(dropped)


def _send_later(number):
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
