"""How to install what an optional part needs: the requirements of an extra of pyproject.toml, by their own names."""

from __future__ import annotations

import importlib.metadata


def how_to_install(*extras) -> str:
    """Return the command that installs what these extras need, such as pip install 'openai>=3,<4'; in a checkout that was never
    installed, that of the extras."""
    from packaging.requirements import Requirement

    try:
        listed = [Requirement(line) for line in importlib.metadata.requires("qlora-trainer") or ()]
    except importlib.metadata.PackageNotFoundError:
        listed = []
    wanted = [
        f"'{one.name}{one.specifier}'"
        for one in listed
        if one.marker is not None and any(one.marker.evaluate({"extra": extra}) for extra in extras)
    ]
    return f"pip install {' '.join(wanted)}" if wanted else f"pip install '.[{','.join(extras)}]'"
