"""The recipes that ship with qlora: recipes/ of a checkout, qlora/shipped/ of an installed package (setup.py)."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError

_PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Return where they lie; raises InputError where they do not."""
    for place in (_PACKAGE / "shipped", _PACKAGE.parent / "recipes"):
        if (place / "quickstart.yaml").is_file():
            return place
    raise InputError(
        "no recipes came with this installation; they are in recipes/ of the source, or make one: qlora init"
    )


def paths() -> dict[str, Path]:
    """Return {name, such as bert-base-uncased/sst2: file}, in order."""
    place = folder()
    return {path.relative_to(place).with_suffix("").as_posix(): path for path in sorted(place.rglob("*.yaml"))}
