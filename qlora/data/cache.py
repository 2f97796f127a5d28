"""The folder of tokenized files."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import time
from pathlib import Path

from ..system.storage import cache_folder

_KEPT_DAYS = 30


@functools.cache
def folder():
    """Return the folder of tokenized files: $QLORA_CACHE, or ~/.cache/qlora; one that goes with the process if neither can
    be written."""
    there = cache_folder() / "tokenized"
    try:
        there.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=there):
            return there
    except OSError:
        import atexit

        there = Path(tempfile.mkdtemp(prefix="qlora-"))
        atexit.register(shutil.rmtree, there, ignore_errors=True)
        return there


def forget_unused():
    """Remove what no run has used for _KEPT_DAYS."""
    for kept in folder().iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if kept.stat().st_mtime < time.time() - _KEPT_DAYS * 86400:
                shutil.rmtree(kept, ignore_errors=True)
