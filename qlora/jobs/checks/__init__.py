"""What qlora doctor looks at: one small function a check, in the order in which a set-up breaks.

A check computes something real where it can. Whatever it raises is what was found: a broken library is no error of ours.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from ...system import errors, secrets
from ...system.events import progress


@dataclass(frozen=True)
class Check:
    """found: in words. remedy: a command, a variable or a field of the recipe; of a check that is ok: what would be better."""

    name: str
    ok: bool
    found: str
    remedy: str | None = None


def checks(folder) -> Iterator[Check]:
    """Yield the Check of each thing that a training needs, the cheap ones first. folder: where runs are to be written.

    Emits Progress with the name of the one that begins: one that hangs, or ends the process, is known by that.
    """
    from . import computing, device, surroundings, versions

    light = {
        "python": versions.python,
        "versions": versions.packages,
        "processes": surroundings.processes,
        "memory": surroundings.memory,
        "disk": lambda: surroundings.disk(folder),
        "libraries": versions.libraries,
    }
    heavy = {
        "hub": surroundings.hub,
        "device": device.device,
        "gpu memory": device.gpu_memory,
        "pinned memory": device.pinned_memory,
        "nf4": computing.nf4_step,
        "optimizer": computing.optimizer_step,
        "attention": computing.attention,
        "threads": surroundings.threads,
    }
    importable = True
    with progress("checking") as advance:
        for name, check in (light | heavy).items():
            advance(1, name)
            found = (
                tried(name, check)
                if importable or name in light
                else Check(name, False, "not checked", "see libraries")
            )
            importable = importable and (name != "libraries" or found.ok)
            yield found


def tried(name, check) -> Check:
    """Return the Check that `check` makes of what it returns, (ok, found, remedy), or raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is found by what fails
            return Check(name, *check())
    except errors.QLoRAError as error:
        return Check(name, False, *_in_two(str(error)))
    except Exception as error:  # of any library: this is what the check is for
        text = secrets.redacted(f"{type(error).__name__}: {error}")
        return Check(name, False, next(iter(text.splitlines())), remedy_of(text))


def _in_two(message):
    """Return (what is wrong, what to do) of a message of ours."""
    found, _, remedy = message.partition("; ")
    return found, remedy or None


# What libraries say of broken set-ups, and what has helped: by the reports of their users.
_REMEDIES = (
    (
        r"driver on your system is too old|driver version is insufficient",
        "update the NVIDIA driver, or install a torch for its CUDA: https://pytorch.org/get-started/previous-versions",
    ),
    (
        r"no kernel image|not compatible with the current PyTorch",
        "this torch has no code for the card: python -m pip install --upgrade torch; an old card needs a build for an older "
        "CUDA: https://pytorch.org/get-started/previous-versions",
    ),
    (
        r"CUDA unknown error|forward compatibility was attempted|initialization error|uncorrectable",
        "restart the machine; after a suspend: sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm",
    ),
    (
        r"CPU-only version of bitsandbytes|compiled without|configured (CUDA|ROCm) binary|libbitsandbytes",
        "unset BNB_CUDA_VERSION; python -m pip install --force-reinstall --no-deps bitsandbytes",
    ),
    (
        r"GLIBC_|GLIBCXX_|CXXABI_|manylinux",
        "the system is older than what the wheel was built for: use a newer one, or a container such as ubuntu:24.04",
    ),
    (
        r"lib(cudart|cublas|cudnn|cusparse|cufft|nvJitLink|nccl|c10|torch)",
        "another CUDA or torch is found first: unset LD_LIBRARY_PATH; python -m pip install --force-reinstall torch",
    ),
    (r"[Oo]ut of memory", "another process holds the card: nvidia-smi lists them"),
    (r"NumPy|numpy", "python -m pip install --upgrade numpy"),
    (r"No module named '([\w.-]+)'", "it is not installed in this Python: python -m pip install -e '.[quickstart]'"),
)


def remedy_of(text) -> str:
    """Return what to do about an error that a library has raised, by its words."""
    found = next((remedy for words, remedy in _REMEDIES if re.search(words, text)), None)
    return found or "install the tested versions anew: python -m pip install -c constraints.txt -e ."
