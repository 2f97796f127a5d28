"""The recipes that ship with qlora, by name: found, described, planned."""

from __future__ import annotations

import difflib
from pathlib import Path

from ... import planner
from ...recipe import Recipe
from ...system.errors import InputError
from ...system.shipped import paths
from .plan_job import budget_of, computer_of, without_data
from .several_card_plans import refuse_sharded


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


def planned(name, card) -> dict:
    """Return {"card", "peak_bytes", "fits", "message", "several_cards"} of a recipe on a card, for rows of data.max_length.

    The model's config.json is looked for on this machine, then on the hub; without it, or where the recipe is for several cards,
    peak_bytes is None, and message says why.
    """
    recipe = Recipe.load(paths()[name])
    budget = budget_of(recipe, card=card)
    several = {"several_cards": recipe.memory.sharding is not None}
    try:
        refuse_sharded(recipe, f"qlora plan {name} --processes 2 --card {card}")
        found = planner.plan(without_data(recipe, budget.kind, budget, computer_of(card)))
    except (InputError, planner.NoPlan) as error:
        return {
            "card": budget.why,
            "peak_bytes": None,
            "fits": None,
            "message": str(error).partition("\n")[0],
        } | several
    return {"card": budget.why, "peak_bytes": found.peak_bytes, "fits": found.fits, "message": ""} | several
