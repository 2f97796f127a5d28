"""Pictures that matplotlib draws, as files that are whole or absent."""

from __future__ import annotations

import io
from pathlib import Path

from ..system.storage import write_bytes


def save(figure, path, **settings):
    """Write a figure to `path`, in the format that its ending names; it is drawn before the file is touched.

    Raises:
        OSError: it cannot be written.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format=Path(path).suffix.lstrip(".").lower(), **settings)
    write_bytes(path, stream.getvalue())
