"""What is known of a weight file once all of it has been read: its SHA-256, and which tensors in it are not finite.

A 7B base has 15 GB. They are read once for both, and what was found is remembered in the cache folder for as long as the
file keeps its place, inode, size and times. That is for convenience: whoever must be certain reads the file (`read`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from safetensors import safe_open

from ..system.storage import cache_folder, sha256, write_json

_SETTLED_SECONDS = 2  # a file changed since may change again without another time: FAT counts in twos
_THREADS = 4  # a core with SHA-NI makes 1.2 GB/s of SHA-256 (measured), disks have more


@dataclass(frozen=True)
class Facts:
    """sha256: of all bytes, in hex. not_finite: the tensors that hold NaN or infinity."""

    sha256: str
    not_finite: tuple


def read(paths):
    """Return {path: Facts} of safetensors files, every byte read once from the disk; they are remembered."""
    stamps, start, stop = {path: _stamp(path) for path in paths}, time.time(), threading.Event()
    found = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            digests = {path: pool.submit(sha256, path, stop) for path in paths}
            for path in paths:  # meanwhile: the page cache has what either of the two has read
                not_finite = _not_finite(path)
                found[path] = Facts(digests[path].result(), not_finite)
        finally:
            stop.set()
    for path, facts in found.items():
        _remember(path, stamps[path], start, facts)
    return found


def remembered(path):
    """Return the Facts of a file as it was read before, None if it has changed since or was never read."""
    try:
        entry = json.loads(_place(path).read_text(encoding="utf-8"))
        facts = Facts(entry["sha256"], tuple(entry["not_finite"]))
        return facts if entry == _entry(_stamp(path), facts) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not there, or damaged: read the file
        return None


def _remember(path, stamp, start, facts):
    newest = max(stamp["mtime_ns"], stamp["ctime_ns"]) / 1e9
    if newest > start - _SETTLED_SECONDS or stamp != _stamp(path):
        return
    place = _place(path)
    with contextlib.suppress(OSError):  # of a cache that cannot be written nothing is lost but time
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, _entry(stamp, facts))


def _entry(stamp, facts):
    """Return what is kept of a file, with a hash of that: one wrong letter, and after the training the base would count as
    changed."""
    kept = {"stamp": stamp, "sha256": facts.sha256, "not_finite": list(facts.not_finite)}
    return kept | {"seal": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()}


def _place(path):
    """Return the file of the cache folder in which the Facts of `path` are."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return cache_folder() / "weights" / f"{name}.json"


def _stamp(path):
    """Return what changes when a file does: ctime too, which nobody can set. path: a Path."""
    found = path.stat()
    return {
        "path": os.path.realpath(path),
        "device": found.st_dev,
        "inode": found.st_ino,
        "bytes": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }


def _not_finite(path):
    with safe_open(path, "pt") as file:  # mapped: what is read here is in memory when the model is loaded
        return tuple(key for key in sorted(file.keys()) if not _is_finite(file.get_tensor(key)))


def _is_finite(tensor):
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    # one reduction: 14 GB/s a core, where isfinite().all() has 0.25; both ends are NaN if one number is
    return all(math.isfinite(end.item()) for end in torch.aminmax(tensor))
