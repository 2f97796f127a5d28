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


def ranges(extras=False):
    """Return [packaging Requirement] that the tests have run with: of the checkout, or of what is installed.

    extras: those of the optional parts instead, but not of development.
    """
    from packaging.requirements import Requirement

    if _PROJECT.is_file():
        heads = ("\n[project.optional-dependencies]\n", "\ndev = [") if extras else ("\ndependencies = [", "\n]")
        listed = _PROJECT.read_text(encoding="utf-8").partition(heads[0])[2].partition(heads[1])[0]
        lines = re.findall(r'"([^"]+)"', re.sub(r"#.*", "", listed))
    else:
        asked = importlib.metadata.requires("qlora-trainer") or []
        lines = [line for line in asked if ("extra ==" in line) == extras and 'extra == "dev"' not in line]
    return [Requirement(line) for line in lines]


def outside(extras=False):
    """Return {name: (version that is installed or None, requirement as text)} of what is not in its tested range.

    What only an extra asks for may be missing.
    """
    found = {}
    for requirement in ranges(extras):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        fits = extras if version is None else requirement.specifier.contains(version, prereleases=True)
        if not fits:
            found[requirement.name] = version, f"{requirement.name}{requirement.specifier}"
    return found


def packages():
    """Return what is outside its range; of the extras it is only said, as it may be there for another program."""
    needed = outside()
    wrong = needed or outside(extras=True)
    said = ", ".join(f"{name} {version or 'is not installed'}" for name, (version, _) in wrong.items())
    remedy = f"python -m pip install {' '.join(repr(wanted) for _, wanted in wrong.values())}" if wrong else None
    if needed:
        return False, f"outside the tested range: {said}", remedy
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _SAID)
    return True, f"{found}; for an extra, outside the tested range: {said}" if wrong else found, remedy


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
