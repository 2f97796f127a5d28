"""Python and libraries: their versions against the tested ranges, and whether they can be imported."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import platform
import re
import sys
from pathlib import Path

_PROJECT = Path(__file__).parents[3] / "pyproject.toml"
_IMPORTED = ("numpy", "torch", "safetensors", "transformers", "bitsandbytes", "peft", "accelerate", "datasets", "trl")
_SAID = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def python():
    ok = (3, 10) <= sys.version_info < (3, 14) and sys.maxsize > 2**32
    bits = 64 if sys.maxsize > 2**32 else 32
    found = f"{platform.python_version()}, {bits} bit, {platform.system()} {platform.machine()}, {sys.executable}"
    return ok, found, None if ok else "use a 64 bit Python 3.10 to 3.13: PYTHON=python3.12 scripts/test.sh"


def ranges():
    """Return [packaging Requirement] that the tests have run with: of the checkout, or of what is installed."""
    from packaging.requirements import Requirement

    if _PROJECT.is_file():
        listed = _PROJECT.read_text(encoding="utf-8").partition("\ndependencies = [")[2].partition("\n]")[0]
        lines = re.findall(r'^ *"([^"]+)"', listed, flags=re.MULTILINE)
    else:
        lines = [line for line in importlib.metadata.requires("qlora-trainer") or [] if "extra ==" not in line]
    return [Requirement(line) for line in lines]


def outside():
    """Return {name: (version that is installed or None, requirement as text)} of what is not in its tested range."""
    found = {}
    for requirement in ranges():
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found[requirement.name] = version, f"{requirement.name}{requirement.specifier}"
    return found


def packages():
    wrong = outside()
    if wrong:
        found = [f"{name} {version or 'is not installed'}" for name, (version, _) in wrong.items()]
        wanted = " ".join(f"'{wanted}'" for _, wanted in wrong.values())
        return False, f"outside the tested range: {', '.join(found)}", f"python -m pip install {wanted}"
    return True, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _SAID), None


def libraries():
    """Import each; the first that breaks is raised, named."""
    from ...system.quiet_libraries import hush_libraries

    with contextlib.suppress(Exception):  # it imports some of them; what breaks is found next
        hush_libraries()
    for name in _IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ImportError(f"{name} cannot be imported: {error}") from error
    return True, f"{len(_IMPORTED)} imported", None
