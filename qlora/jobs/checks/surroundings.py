"""What a process gets of the machine: disk, memory, cores, the hub's cache; and whether it is alone."""

from __future__ import annotations

import math
import os
import tempfile
import time
from pathlib import Path

from ...system import launched, storage
from ...system.units import size

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_FREE_ENOUGH = 2 * 2**30  # an adapter of a 7B and its checkpoints; an export is checked by export
_WRITTEN = 64 * 2**20


def processes():
    found = launched.several()
    if found is not None:
        return False, f"one of several processes ({found})", f"start one, or unset {found.partition('=')[0]}"
    return True, "one", None


def memory():
    """What is free, and whether a container has less."""
    import psutil

    now, limit = psutil.virtual_memory(), memory_limit()
    found = f"{size(now.available)} of {size(now.total)} free"
    if limit is not None and limit < now.available:
        budget = f"{limit / 2**30:.1f}GiB"
        return True, f"{found}, but this container may take {size(limit)}", f"on a CPU set memory.budget={budget}"
    enough = now.available > 4 * 2**30
    return (
        enough,
        found,
        None if enough else "end other programs: 4 GiB are needed to load a model of 1B and its libraries",
    )


def memory_limit(groups=_GROUPS, own=_OWN):
    """Return the bytes that the control group of this process allows, or None."""
    return _least(groups, own, "memory.max", "memory/memory.limit_in_bytes", lambda text: int(text.split()[0]))


def core_limit(groups=_GROUPS, own=_OWN):
    """Return the cores that the control group of this process allows, such as 1.5, or None."""

    def cores(text):
        quota, period = text.split()
        return int(quota) / int(period)

    return _least(groups, own, "cpu.max", None, cores)


def _least(groups, own, name, older_name, number):
    """Return the least of what a file of the process' group, and of those around it, says; None where none limits."""
    files = [] if older_name is None else [groups / older_name]
    try:
        path = own.read_text(encoding="utf-8").strip().rpartition("\n")[2].rpartition(":")[2].strip("/")
    except OSError:
        path = ""
    inner = groups / path
    files += [place / name for place in (inner, *inner.parents) if groups in (place, *place.parents)]
    limits = []
    for file in files:
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text and not text.startswith("max"):
            limits.append(number(text))
    least = min(limits, default=None)
    return (
        None if least is None or least > 2**60 else least
    )  # the first version's word for no limit is 2^63 less a page


def cores():
    """Return how many cores this process may keep busy."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, math.ceil(core_limit() or usable)))


def threads():
    """More threads than cores wait for each other, many times slower; fewer leave cores idle."""
    import torch

    number, usable = torch.get_num_threads(), cores()
    own = os.environ.get("OMP_NUM_THREADS")
    found = f"{number} for {usable} core{'s' * (usable > 1)}" + ("" if own is None else f" (OMP_NUM_THREADS={own})")
    if number > usable:
        return False, found, f"OMP_NUM_THREADS={usable}"
    if number < usable / 2 and own is not None and not torch.cuda.is_available():
        return True, found, "unset OMP_NUM_THREADS"
    return True, found, None


def disk(folder):
    """Write, flush and lock a file where runs are to go; nothing is left there."""
    folder = Path(folder).absolute()
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not place.is_dir():
        return False, f"{place} is a file", "set output_dir to a folder"
    free = storage.free_disk_bytes(place)
    if free < _FREE_ENOUGH:
        return False, f"{size(free)} free in {place}", "free some space, or set output_dir=ANOTHER_FOLDER"
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".qlora-doctor-", dir=place) as scratch,
            storage.locked(Path(scratch) / "lock", scratch, "try again"),
        ):
            rate = _write_rate(Path(scratch) / "written")
    except OSError as error:
        return False, f"{place}: {error.strerror}", "set output_dir to a folder that you may write to"
    return True, f"{size(free)} free in {place}, {rate / 1e6:,.0f} MB/s written", None


def _write_rate(path):
    """Return bytes a second, until they are on the disk."""
    block, start = os.urandom(2**20), time.monotonic()
    with open(path, "wb") as file:
        for _ in range(_WRITTEN // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return _WRITTEN / max(time.monotonic() - start, 1e-9)


def hub():
    """Where downloaded models are kept, whether they may be downloaded, and whether there is a login. Nothing is sent."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    place = next(parent for parent in (cache, *cache.absolute().parents) if parent.exists())
    free = storage.free_disk_bytes(place)
    offline = ", HF_HUB_OFFLINE is set: only what is there can be used" if constants.HF_HUB_OFFLINE else ""
    login = get_token() is not None
    found = f"cache {cache}, {size(free)} free{offline}; {'a login is stored' if login else 'no login'}"
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return False, f"{found}, {error.strerror}", "HF_HOME=ANOTHER_FOLDER; or give model.name_or_path a local folder"
    better = ["HF_HOME=ANOTHER_FOLDER: a 7B takes 15 GB"] if free < 20 * 2**30 else []
    better += [] if login else ["hf auth login, for models that ask for one, such as Llama and Gemma"]
    return True, found, "; ".join(better) or None
