"""Keep memory that a step frees in the process, for the next step, on a CPU under glibc.

By default glibc returns large freed tensors, and the top of the heap, to the system, and every new allocation faults in zeroed
pages again: a quarter of a training step (docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h


@contextlib.contextmanager
def kept_memory(device):
    """Keep freed memory while the block runs; yields whether that can be done here. Afterwards it is given back."""
    libc = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):  # musl has none; macOS and Windows do otherwise
        yield False
        return
    done = libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield bool(done)
    finally:
        # setting any of these ends glibc's own adjustment of them: leave what it would have arrived at
        libc.mallopt(_MMAP_MAX, 65536)
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 64 * 2**20)
        libc.malloc_trim(0)
