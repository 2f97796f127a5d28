"""The time of a run: in all, and in its steps alone."""

from __future__ import annotations

import contextlib
import time


class Clock:
    """Seconds of a run over all processes that have worked on it, from its first step on.

    seconds: of the run before this process went on with it. outside_seconds: of them in evaluations and checkpoints.
    tokens: that were trained on by then.
    """

    def __init__(self, seconds=0.0, outside_seconds=0.0, tokens=0):
        self.outside_seconds, self._tokens = outside_seconds, tokens
        self._start = time.monotonic() - seconds
        self._last = time.monotonic()

    def begin(self):
        """Count from now on: what came before, in this process, was preparation."""
        seconds = self._last - self._start
        self._last = time.monotonic()
        self._start = self._last - seconds

    def elapsed(self):
        return time.monotonic() - self._start

    @contextlib.contextmanager
    def outside(self):
        """Exclude the time of the block (an evaluation, a checkpoint) from that of the steps."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self.outside_seconds += seconds
            self._last += seconds

    def rate(self, tokens):
        """Return the tokens per second in the steps since this was asked last. tokens: in all, until now."""
        now = time.monotonic()
        rate = (tokens - self._tokens) / max(now - self._last, 1e-9)
        self._last, self._tokens = now, tokens
        return rate
