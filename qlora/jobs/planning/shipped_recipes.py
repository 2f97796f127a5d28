"""The recipes that ship with qlora, by name. Without the libraries of models; recipe_on_card.py plans them."""

from __future__ import annotations

import difflib
from pathlib import Path

from ...recipe import Recipe
from ...system.errors import InputError
from ...system.shipped import paths


def path_of(name) -> Path:
    """Return the file of the recipe `name`; its model alone will do where it has one recipe. Raises InputError."""
    known = paths()
    wanted = str(name).removeprefix("recipes/").removesuffix(".yaml")
    found = [one for one in known if wanted in (one, one.partition("/")[0])]
    if len(found) == 1:
        return known[found[0]]
    near = found or difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    raise InputError(
        f"no recipe {name!r}; {'did you mean ' + ' or '.join(near) if near else 'there are ' + ', '.join(known)}?"
    )


def described() -> list[dict]:
    """Return [{"name", "path", "model", "task", "method", "about"}]; about: the first line of its header."""
    found = []
    for name, path in paths().items():
        recipe = Recipe.load(path)
        first = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").rstrip(".")
        method = recipe.method.key + ("" if recipe.quantization is None else " on NF4")
        found.append({"name": name, "path": str(path), "model": recipe.model.name_or_path, "task": recipe.task,
                      "method": method, "about": first})  # fmt: skip
    return found
