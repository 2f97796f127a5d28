"""Safetensors shards written tensor by tensor: sizes are known ahead, so the header comes first and nothing is held.

`safetensors.torch.save_file` needs every tensor of a shard in memory at once. Format: 8 bytes little-endian header
length, the JSON header padded with spaces to a multiple of 8, then the data at the offsets it names.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..system.errors import InputError
from ..system.events import progress
from ..system.storage import write_json

DTYPE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64",
                torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
                torch.float64: "F64", torch.int16: "I16"}  # fmt: skip
_BUFFER_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Spec:
    """A tensor to be written: its name, shape and dtype."""

    name: str
    shape: tuple
    dtype: torch.dtype

    @property
    def num_bytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


def shards(specs, max_bytes):
    """Return the specs in order, cut into lists of at most `max_bytes` (a larger tensor has a shard of its own)."""
    result, room = [], 0
    for spec in specs:
        if not result or spec.num_bytes > room:
            result.append([])
            room = max_bytes
        result[-1].append(spec)
        room -= spec.num_bytes
    return result


def write(folder, specs, pieces_of, max_bytes):
    """Write shards and, for more than one, the index into `folder`; return the bytes of all tensors.

    pieces_of(name): called once for each spec, in order; yields the tensor in pieces, first numbers first, in the dtype
    that the spec says. The next piece is made while one is being written.
    """
    parts = shards(specs, max_bytes)
    total = sum(spec.num_bytes for spec in specs)
    weight_map = {}
    with ThreadPoolExecutor(max_workers=1) as thread, progress("writing", total, "bytes") as advance:
        for number, part in enumerate(parts, start=1):
            single = len(parts) == 1
            name = "model.safetensors" if single else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            try:
                with _Output(folder / name, thread) as file:
                    file.write(_header(part))
                    for spec in part:
                        _write_tensor(file, spec, pieces_of(spec.name), advance)
                        weight_map[spec.name] = name
            except OSError as error:
                raise InputError(f"{folder / name}: {error.strerror}; {total:,} bytes are to be written") from None
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return total


def _write_tensor(file, spec, pieces, advance):
    written = 0
    for piece in pieces:
        assert piece.dtype == spec.dtype, (spec, piece.dtype)
        data = piece.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
        file.write(data)
        written += len(data)
        advance(len(data))
    assert written == spec.num_bytes, (spec, written)


class _Output:
    """A new file that is written past the page cache where the system allows it, by a thread, 8 MiB at a time.

    Nobody reads the file soon, and filling the cache costs more than the disk: on a virtual machine 2 GiB took 4 to 6 s
    of a core through the cache and 0.2 s past it (docs/log.md).
    """

    def __init__(self, path, thread):
        self.thread, self.waiting, self.filled = thread, None, 0
        self.buffers = [mmap.mmap(-1, _BUFFER_BYTES) for _ in range(2)]  # begin at a page, as O_DIRECT wants it
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)  # text is Windows' default
        try:
            self.file = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # tmpfs and others have no O_DIRECT
                raise
            self.file = os.open(path, flags & ~os.O_EXCL, 0o666)

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        try:
            if kind is None:
                self._wait()
                if hasattr(os, "O_DIRECT"):  # the end is no whole page
                    import fcntl  # not on Windows

                    fcntl.fcntl(self.file, fcntl.F_SETFL, fcntl.fcntl(self.file, fcntl.F_GETFL) & ~os.O_DIRECT)
                _write_all(self.file, memoryview(self.buffers[0])[: self.filled])
        finally:
            if self.waiting is not None:
                self.waiting.exception()  # the thread may still be writing
            os.close(self.file)

    def write(self, data):
        data = memoryview(data)
        while len(data):
            count = min(len(data), _BUFFER_BYTES - self.filled)
            self.buffers[0][self.filled : self.filled + count] = data[:count]
            self.filled += count
            data = data[count:]
            if self.filled == _BUFFER_BYTES:
                self._wait()
                self.waiting = self.thread.submit(_write_all, self.file, memoryview(self.buffers[0]))
                self.buffers.reverse()
                self.filled = 0

    def _wait(self):
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            waiting.result()


def _write_all(file, view):
    while len(view):
        view = view[os.write(file, view) :]


def _header(part):
    header: dict[str, dict]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for spec in part:
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
