"""Tensors read from safetensors files a few rows at a time, into memory that is used again.

Reading, not mapping: a mapped file costs a page fault for every 4 KiB, cold or not (measured on a virtual machine: 0.27 GB/s
mapped, 0.59 GB/s read, from the same disk). And past the page cache what is not in it: each byte is needed once, and going
through the cache costs more than the disk (docs/log.md).
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import threading

import torch

from ..system.errors import InputError
from .writer import DTYPE_NAMES

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_NOT_HERE = (errno.EINVAL, errno.EOPNOTSUPP)  # what a file system says of what it cannot do
_PIECE_BYTES = 8 * 2**20
_local = threading.local()


class Reader:
    """The tensors of a base_model.Checkpoint. `with Reader(checkpoint) as reader:` closes its files."""

    def __init__(self, checkpoint):
        self.checkpoint = checkpoint
        self._files, self._places, self._memory = {}, {}, torch.empty(0, dtype=torch.uint8)
        for name in sorted(set(checkpoint.files.values())):
            file = self._files[name] = _File(checkpoint.folder / name)
            length = int.from_bytes(file.read(8, 0), "little")
            header = json.loads(file.read(length, 8))
            for tensor, entry in header.items():
                if tensor != "__metadata__":
                    if entry["dtype"] not in _DTYPES:
                        raise InputError(f"{checkpoint.folder / name}: {tensor} is {entry['dtype']}, not 16 or 32 bit")
                    place = (file, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
                    self._places[tensor] = (*place, 8 + length + entry["data_offsets"][0])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for file in self._files.values():
            file.close()

    def shape(self, name):
        return self._places[name][2]

    def dtype(self, name):
        return self._places[name][1]

    def rows(self, name):
        """Return an object whose slices [first:last] are rows of the tensor, each read into memory of its own."""
        return _Rows(*self._places[name])

    def whole(self, name, each=map):
        """Return a tensor. Its memory is that of the tensor asked for before: keep no more than one.

        each: how pieces are gone through, such as threads.Cores.map.
        """
        file, dtype, shape, offset = self._places[name]
        size = math.prod(shape) * dtype.itemsize
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        data = self._memory[:size]
        starts = range(0, size, _PIECE_BYTES)
        for _ in each(lambda at: file.fill(data[at : at + _PIECE_BYTES], offset + at), starts):
            pass
        return data.view(dtype).view(shape)


class _Rows:
    def __init__(self, file, dtype, shape, offset):
        self.file, self.dtype, self.shape, self.offset = file, dtype, shape, offset

    def __getitem__(self, rows):
        first, last, _ = rows.indices(self.shape[0])
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = torch.empty(max(0, last - first) * row, dtype=torch.uint8)
        self.file.fill(data, self.offset + first * row)
        return data.view(self.dtype).view(-1, *self.shape[1:])


class _File:
    """A file that is read from the page cache where it is there, and past it where it is not."""

    def __init__(self, path):
        self.path = path
        self._cached = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # text is Windows' default
        self._direct = None
        self._alone = threading.Lock()
        self._looks_into_the_cache = True
        if hasattr(os, "O_DIRECT") and hasattr(os, "RWF_NOWAIT"):
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno not in _NOT_HERE:  # tmpfs and others have no O_DIRECT
                    raise

    def close(self):
        for descriptor in (self._cached, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def read(self, length, offset):
        data = torch.empty(length, dtype=torch.uint8)
        self.fill(data, offset)
        return data.numpy().tobytes()

    def fill(self, data, offset):
        """Read len(data) bytes from `offset` into `data`, uint8; raises InputError if the file is shorter."""
        view, done = memoryview(data.numpy()), 0
        while done < len(view):
            try:
                count = self._some(view[done:], offset + done)
            except OSError as error:
                raise InputError(f"{self.path}: {error.strerror}; it cannot be read") from None
            if count == 0:
                raise InputError(f"{self.path}: {len(view) - done} bytes are missing at its end; download it again")
            done += count

    def _some(self, view, offset):
        direct = self._direct  # other threads read too
        if direct is not None and self._looks_into_the_cache:
            try:
                try:
                    return os.preadv(self._cached, [view], offset, os.RWF_NOWAIT)
                except BlockingIOError:  # not in the cache
                    return _past_the_cache(direct, view, offset)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                self._looks_into_the_cache = False  # not on this file system
        if hasattr(os, "preadv"):
            return os.preadv(self._cached, [view], offset)
        with self._alone:  # Windows: reading moves the file's one position
            os.lseek(self._cached, offset, os.SEEK_SET)
            data = os.read(self._cached, len(view))
        view[: len(data)] = data
        return len(data)


def _past_the_cache(descriptor, view, offset):
    """Read some bytes by whole pages, into memory that begins at a page, and copy those that are wanted."""
    if not hasattr(_local, "pages"):
        _local.pages = mmap.mmap(-1, _PIECE_BYTES + 2 * mmap.PAGESIZE)
    before = offset % mmap.PAGESIZE
    wanted = min(len(view), _PIECE_BYTES)
    pages = -(-(before + wanted) // mmap.PAGESIZE) * mmap.PAGESIZE
    with memoryview(_local.pages) as memory:
        count = os.preadv(descriptor, [memory[:pages]], offset - before)
        found = max(0, min(count - before, wanted))
        view[:found] = memory[before : before + found]
    return found
