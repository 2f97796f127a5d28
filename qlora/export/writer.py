"""Safetensors shards written tensor by tensor: sizes are known ahead, so the header comes first and nothing is held.

`safetensors.torch.save_file` needs every tensor of a shard in memory at once. Format: 8 bytes little-endian header
length, the JSON header padded with spaces to a multiple of 8, then the data at the offsets it names.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..errors import InputError
from ..rundir import write_json

_DTYPE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64",
                torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL"}  # fmt: skip
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Spec:
    """A tensor to be written: its name, shape and dtype."""

    name: str
    shape: tuple
    dtype: torch.dtype

    @property
    def num_bytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(text):
    """Return bytes of "5GB" (10**9) or "5GiB" (2**30); raises InputError otherwise."""
    text = text.strip().upper()
    unit = next((unit for unit in _UNITS if text.endswith(unit)), None)
    number = text.removesuffix(unit or "").strip()
    if unit is None or not number.replace(".", "", 1).isdigit() or float(number) * _UNITS[unit] < 1:
        raise InputError(f"export.max_shard_size {text!r}: give a size such as 5GB or 500MiB")
    return int(float(number) * _UNITS[unit])


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


def write(folder, specs, pieces_of, max_bytes, on_bytes=None):
    """Write shards and, for more than one, the index into `folder`; return the bytes of all tensors.

    pieces_of(name): called once for each spec, in order; yields the tensor in pieces, first numbers first, in the dtype
    that the spec says. on_bytes(count): called after each piece. The next piece is made while one is being written.
    """
    parts = shards(specs, max_bytes)
    total = sum(spec.num_bytes for spec in specs)
    weight_map = {}
    with ThreadPoolExecutor(max_workers=1) as thread:
        for number, part in enumerate(parts, start=1):
            single = len(parts) == 1
            name = "model.safetensors" if single else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            with open(folder / name, "wb") as file:
                file.write(_header(part))
                for spec in part:
                    try:
                        _write_tensor(file, spec, pieces_of(spec.name), thread, on_bytes or (lambda count: None))
                    except OSError as error:
                        raise InputError(
                            f"{folder / name}: {error.strerror}; {total:,} bytes are to be written"
                        ) from None
                    weight_map[spec.name] = name
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return total


def _write_tensor(file, spec, pieces, thread, on_bytes):
    waiting, written = None, 0
    for piece in pieces:
        assert piece.dtype == spec.dtype, (spec, piece.dtype)
        data = piece.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
        if waiting is not None:
            waiting.result()
        waiting = thread.submit(file.write, data)
        written += len(data)
        on_bytes(len(data))
    if waiting is not None:
        waiting.result()
    assert written == spec.num_bytes, (spec, written)


def _header(part):
    header: dict[str, dict]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for spec in part:
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
