"""What a recipe would cost on several cards: its own data, with the base whole on each and in shares."""

from __future__ import annotations

from ..planner import ALONE, Together, several_cards
from ..planner.several_cards import Way
from ..recipe import Recipe
from ..system.errors import InputError
from ..training import sharding
from ..training.processes import refuse_unsupported
from .plan_job import Budget, job_of, without_data
from .prepared_data import Prepared


def plan_several(recipe: Recipe, prepared: Prepared | None, budget: Budget, on, count: int, link=None) -> list[Way]:
    """Return the planner's Ways of training `recipe` on `count` cards, one card first.

    prepared: the recipe's data, None where it is not there. on: the base_model.Computer that is to train. link: bytes a second
    between cards, None: as of the card.

    Raises:
        InputError: several processes do not do that, or the batch does not divide by them.
        planner.NoPlan: the model cannot be planned.
    """
    if count < 2:
        raise InputError(f"--processes {count}: give 2 or more; without it, the plan is of one card")
    refuse_unsupported(recipe, count)

    if link is None and budget.card is not None:
        link = budget.card.link_bandwidth
    kinds = [ALONE, Together(count, link=link)]
    if sharding.can_share(recipe):
        kinds.append(Together(count, shares=True, link=link))
    return several_cards.ways([_job(recipe, prepared, budget, on, together) for together in kinds])


def _job(recipe, prepared, budget, on, together):
    if prepared is None:
        return without_data(recipe, "cuda", budget, on, together)
    return job_of(prepared, "cuda", budget, together=together)


def refuse_sharded(recipe: Recipe, command):
    """Raise InputError where `recipe` is for several processes; command: what plans them."""
    if recipe.memory.sharding is not None:
        raise InputError(
            f"memory.sharding: fsdp is for several processes, one a card; plan them with: {command}\n"
            "  or set memory.sharding=null for the plan of one card"
        )
