"""Memory in bytes: measured, counted from stored tensors, and refused."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import re
import sys
import threading
import time
import traceback
import weakref

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# oneDNN, and torch above it, keep the compiled code of the last 1,024 products, and each number of rows is another: on a CPU,
# batches of joined rows add half a GiB in 150 steps (docs/log.md). Both read this when they first multiply. A step has fewer.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")

# Rows of ever other lengths leave holes between blocks of fixed size; segments that grow leave none. Read when CUDA starts. Who
# has set either name (the second is the older one) has decided. Windows' driver does not have them.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# of c10's allocator for the CPU; of drivers, where memory is pinned too, HIP's and Metal's; of libraries that ask the driver
# themselves when they first multiply; of oneDNN when it gets none for its code (torch 2.13); of Python for a thread's stack
_REFUSALS = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED", "could not create a primitive",
             "can't start new thread")  # fmt: skip

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc, malloc.h
IN_HEAP_BELOW = 4 * 2**20  # bytes: larger blocks are the system's, and leave no holes
_given_back = 0.0  # when


MAY_BE_REFUSALS = (RuntimeError, MemoryError, SystemError)  # of these, is_refusal tells which are


def is_refusal(error):
    """Return whether an exception is an out-of-memory error, of a GPU or of the CPU's allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, SystemError):  # CPython's words for C code that was refused an object and did not say so
        return "exception set" in str(error) or "without setting an exception" in str(error)
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSALS)


def release(error):
    """Let go of what the frames of a caught `error` hold, as far as they have ended; then leave the `except` block.

    The locals of a forward pass are its activations, and an exception keeps every frame that it came through.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def free_cached():
    """Collect what nothing refers to any more, and give blocks that torch keeps for later back to the device."""
    gc.collect()  # an autograd graph may be a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def freed_at_once():
    """Let blocks of 1 MiB and more go back to the system as soon as they are freed, while a `with` block runs; then, of 4 MiB.

    Reading and quantizing frees more than it keeps, and glibc's heap keeps the holes between: SmolLM2-135M, whose weights are
    55 MiB of anonymous memory then, held 338 and 555 MiB after loading, with this 67. Later, while such a model trains, blocks
    of 1 MiB come too often: asking the system for each took a third of the time. Other C libraries do not have it.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:  # glibc arrives at 32 and 64 MiB by itself, and no longer does once it has been told
        libc.mallopt(_MMAP_THRESHOLD, IN_HEAP_BELOW)
        libc.mallopt(_TRIM_THRESHOLD, 2 * IN_HEAP_BELOW)
        libc.malloc_trim(0)


def give_back_holes(device):
    """Give what is free in glibc's heap back to the system where a model computes on a CPU, but not twice a second: it takes 5 to
    30 ms.

    Blocks below 4 MiB leave holes. Between micro-batches nearly all of the heap is free, so a step does not pay for those of
    the steps before it: a model with Qwen2.5's shape held 410 to 570 MiB before, and 290 since. Before the optimizer's step, full
    fine-tuning of SmolLM2-135M held 2,960 MiB, and 2,540 since.
    """
    global _given_back
    libc, now = _glibc() if device.type == "cpu" else None, time.monotonic()
    if libc is not None and now - _given_back > 0.5:
        libc.malloc_trim(0)
        _given_back = now


@functools.cache
def _glibc():
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None


def refused(error):
    """Return how much was requested, and how much was free where torch says that, in words."""
    text = str(error)
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    free = re.search(r"of which ([\d.]+ \w+) is free", text)
    if asked is None:
        return next(iter(text.splitlines()), "") or "no more memory is available"
    return f"{asked[1]} requested" + (f", {free[1]} free" if free else "")


def fragmented_bytes():
    """Return what torch's allocator on a GPU holds beside its tensors, at most; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0
    return max(0, torch.cuda.max_memory_reserved() - torch.cuda.max_memory_allocated())


def available_bytes(device):
    """Return the bytes that are free on a GPU, or that the system can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def held_bytes():
    """Return what this process holds now, in the terms of `Peak`. torch counts it on the host: no GPU is asked."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else anonymous_bytes()


class Peak:
    """The most memory that this process has held since a `with` block began: `bytes`.

    On a GPU what torch has allocated there. On a CPU the process' anonymous memory, seen every 10 ms: files that are
    mapped or cached are not held, the system takes their pages back when it needs them.
    """

    def __init__(self):
        self._most, self._lap, self._on_gpu = 0, 0, False  # _lap: on a CPU, since `lap`
        self._done = threading.Event()
        self._done.set()

    def __enter__(self):
        self._done = threading.Event()
        self._on_gpu = torch.cuda.is_available()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception):
        self._most = self.bytes
        self._lap, self._on_gpu = 0, False
        self._done.set()

    @property
    def bytes(self):
        return max(self._most, self._of_lap())

    def lap(self):
        """Return the most since the block or the last lap began, and begin another; `bytes` is of all of them."""
        found = self._of_lap()
        self._most = max(self._most, found)
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._lap = anonymous_bytes()
        return found

    def _of_lap(self):
        if self._on_gpu:
            return torch.cuda.max_memory_allocated()
        return self._lap if self._done.is_set() else max(self._lap, anonymous_bytes())

    def _watch(self):
        while not self._done.wait(0.01):
            self._lap = max(self._lap, anonymous_bytes())


def anonymous_bytes(process="self"):
    """Return the bytes that a process holds apart from mapped files; with those on macOS, which does not say."""
    try:
        with open(f"/proc/{process}/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        held = psutil.Process(None if process == "self" else process).memory_info()
        return getattr(held, "private", held.rss)  # private: Windows


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that live at each moment of a `with` block, on any device, the meta device included.

    bytes: now; peak: the most; levels: `bytes` after every tensor made or freed, in order. Tensors from before the block
    count from `add` on. What a kernel allocates within one operation is not seen; bitsandbytes' 4-bit product is, it is
    taken apart.
    """

    def __init__(self, *tensors):
        super().__init__()
        self.bytes = self.peak = 0
        self.levels: list[int] = []
        self._storages: dict = {}  # address -> weak reference, which the storage's end takes out
        self.add(*tensors)

    def add(self, *tensors):
        for tensor in tensors:
            self._see(tensor, True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._see((args, *kwargs.values()), False)
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

            with self:
                return _gemm_4bit_default_impl(*args, **kwargs)
        made = self.compute(func, args, kwargs)
        self._see(made, True)
        return made

    def compute(self, func, args, kwargs):
        return func(*args, **kwargs)

    def _see(self, found, counts):
        """Note a tensor, or those in a list or tuple: what operations take and give. tree_leaves takes as long as they do."""
        if isinstance(found, (list, tuple)):
            for each in found:
                self._see(each, counts)
        elif isinstance(found, torch.Tensor):
            self._note(found.untyped_storage(), counts)

    def _note(self, storage, counts):
        if storage._cdata not in self._storages:
            num_bytes = storage.nbytes() if counts else 0
            end = self._end(storage._cdata, num_bytes)
            self._storages[storage._cdata] = weakref.ref(storage, end)
            self._change(num_bytes)

    def _end(self, address, num_bytes):
        def end(_):
            del self._storages[address]
            self._change(-num_bytes)

        return end

    def _change(self, num_bytes):
        if num_bytes:
            self.bytes += num_bytes
            self.peak = max(self.peak, self.bytes)
            self.levels.append(self.bytes)
