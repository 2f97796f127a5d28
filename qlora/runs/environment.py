"""What a run was made with: the part of environment.json that is the same whatever is trained."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
import uuid
from pathlib import Path

import qlora

OURS = "qlora-trainer"  # what this package is called where it is installed
PACKAGES = (
    OURS,
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
)


def environment(device) -> dict:
    """Return {"id", "versions", "device", "git_commit", "directory"} of a run that begins here, on a torch device."""
    import torch

    return {
        "id": uuid.uuid4().hex,  # checkpoints say whose they are
        "versions": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in PACKAGES},
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "git_commit": _git_commit(),
        "directory": str(Path.cwd()),  # relative paths of the recipe start here
    }


def served_with(device) -> dict:
    """Return {"versions", "device"} of what is measured here: also of the packages that serve, where they are installed."""
    found = environment(device)
    more = {name: version_of(name) for name in ("torchao", "llama-cpp-python", "gguf")}
    installed = {name: version for name, version in more.items() if version != "checkout"}
    return {"versions": found["versions"] | installed, "device": found["device"]}


@functools.cache
def version_of(name):
    """Return the version of a package; "checkout" of one that runs from its folder without being installed.

    Of qlora itself that of the code: an editable installation keeps the number that it was installed with.
    """
    if name == OURS:
        return qlora.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "checkout"


def _git_commit():
    """Return the commit of the checkout that the package belongs to, or None for an installed package.

    A .venv often lies in the checkout of another project, which does not have its files.
    """
    file = Path(__file__)
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        return _git(file.parent, "rev-parse", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder, *words):
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout
