"""A recipe that ships with qlora, planned for a card."""

from __future__ import annotations

from ... import planner
from ...recipe import Recipe
from ...system.errors import InputError
from ...system.shipped import paths
from .plan_job import budget_of, computer_of, without_data
from .several_card_plans import refuse_sharded


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
