"""Run a chat template or regular expression from elsewhere with a limit on its time and its memory.

Jinja's sandbox keeps a template away from the machine, but lets it loop for years and allocate all memory. Both limits are the
kernel's, so they hold whatever the template does, in every row, at a cost of some microseconds per call: a timer on the
processor time of this process (a template never waits), and a limit on its address space. Windows has neither, macOS no limit
on the address space: what is missing is not bounded there.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading

with contextlib.suppress(ImportError):  # Windows
    import resource

SECONDS = 10  # of processor time; a conversation takes a thousandth of one
BYTES = 2**30


class TookTooLong(BaseException):
    """Raised in what is running. No Exception, so that jinja does not take it for a constant that it cannot fold."""


def call(function):
    """Return function().

    Off the main thread, where Python has no timers, only memory is bounded. One step of C code is not cut short unless it
    looks for signals.

    Raises:
        TookTooLong: after SECONDS.
        MemoryError: BYTES more than before were asked for.
    """
    if not hasattr(signal, "setitimer"):  # Windows
        return function()
    soft, hard = limits = resource.getrlimit(resource.RLIMIT_AS)
    # measured in each call: with a limit that the process has outgrown every allocation would fail, and C code crashes
    most = _address_space() + BYTES
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
    """Return the bytes of address space that this process has; where the system does not say, as good as no end."""
    file = _statm(os.getpid())
    return 2**62 if file is None else int(os.pread(file, 32, 0).split()[0]) * resource.getpagesize()


@functools.cache
def _statm(process):
    """Return an open file whose first number is the address space of this process in pages; a fork has to open its own."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None


def _stop(number, frame):
    raise TookTooLong
