"""stdout and stderr of a command, whose readers may leave."""

from __future__ import annotations

import errno
import os


class Lasting:
    """A text stream whose reader may leave, as a closed pipe or terminal does: what is written then is dropped; and
    which writes \\xe9 for what its encoding lacks."""

    def __init__(self, stream):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self):
        self._try(self._stream.flush)

    def _try(self, action):
        try:
            action()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise OSError(error.errno, error.strerror, self._stream.name) from None
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
