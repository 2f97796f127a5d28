"""Run what a file from elsewhere says, a chat template, with an end to its time and its memory.

The sandbox keeps a template from the machine, and lets it loop for years and ask for all memory there is. Both ends are the
kernel's, so that they hold whatever the template does, in every row and not in a trial only, for some microseconds a call: a
timer on the processor time of this process (a template never waits), and a limit on its address space.
"""

from __future__ import annotations

import functools
import resource
import signal
import threading

SECONDS = 10  # of processor time; a conversation takes a thousandth of one
BYTES = 2**30

_STATM = "/proc/self/statm"  # its first number is the address space in pages; not everywhere
_most: int | None = (
    None  # the address space that is allowed; measured rarely, because reading it is most of what a call costs
)


class TookTooLong(BaseException):
    """Raised in what is running. No Exception, so that jinja does not take it for a constant that it cannot fold."""


def call(function):
    """Return function(), which has no effects: it may be called a second time.

    Off the main thread, where Python has no timers, only memory is bounded. One step of C code is not cut short unless it
    looks for signals.

    Raises:
        TookTooLong: after SECONDS.
        MemoryError: BYTES more than before were asked for.
    """
    global _most
    if _most is not None:
        try:
            return _call(function, _most)
        except MemoryError:
            pass  # or the process has grown since
    _most = _address_space() + BYTES
    return _call(function, _most)


def _call(function, most):
    soft, hard = limits = resource.getrlimit(resource.RLIMIT_AS)
    most = most if soft == resource.RLIM_INFINITY else min(soft, most)
    timed = threading.current_thread() is threading.main_thread()
    if timed:
        _take_the_signal()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        try:
            if timed:
                signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1)  # again, should something catch the first
            return function()
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except TookTooLong:  # perhaps within the lines above
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@functools.cache
def _take_the_signal():
    signal.signal(signal.SIGVTALRM, _stop)  # nothing else here uses it, and a fork has it too


def _address_space():
    try:
        with open(_STATM, "rb", buffering=0) as file:
            return int(file.read(32).split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        return 2**62


def _stop(number, frame):
    raise TookTooLong
