"""What a recipe would cost on several cards: its own data, with the base whole on each and in shares."""

from __future__ import annotations

from ...planner import Together, several_cards
from ...planner.several_cards import Way
from ...recipe import Recipe
from ...system.errors import InputError
from ...training import sharding
from ...training.processes import refuse_unsupported
from ..opening.prepared_data import Prepared
from .plan_job import Budget, job_of, without_data

MOST = 64  # cards


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
    job = jobs_of_cards(recipe, prepared, budget, on)
    jobs = [job(1), job(count, link=link)]
    refuse_unsupported(recipe, count, jobs[1].load.joins_steps)
    if sharding.can_share(recipe):
        jobs += [job(count, offload, link) for offload in (False, True)]
    return several_cards.ways(jobs)


def fewest(recipe: Recipe, prepared: Prepared | None, budget: Budget, on, count: int, link=None) -> Way | None:
    """Return the Way of the fewest cards above `count` that hold `recipe`, with the base in shares; None: no number up to MOST
    that its batch divides by does. Raises as plan_several does."""
    job = jobs_of_cards(recipe, prepared, budget, on)
    for number in range(count + 1, MOST + 1) if sharding.can_share(recipe) else ():
        try:
            refuse_unsupported(recipe, number)
        except InputError:  # the batch does not divide by it
            continue
        for offload in (False, True):
            way = several_cards.way(job(number, offload, link))
            if way.plan.fits:
                return way
    return None


def jobs_of_cards(recipe, prepared, budget, on):
    """Return job(count, offload, link) -> planner.Job of training on `count` cards; the arguments are those of plan_several.

    offload: whether the base's shares are in CPU memory; None: it is whole on each card.
    """
    made: list = []

    def job(count, offload=None, link=None):
        card, remade = budget.card, made[0].remade if made else None
        if link is None and card is not None:
            link = card.link_bandwidth
        together = Together(count, offload is not None, bool(offload), link, card and card.host_bandwidth)
        if prepared is None:
            made.append(without_data(recipe, "cuda", budget, on, together, remade))
        else:
            made.append(job_of(prepared, "cuda", budget, together=together, remade=remade))
        return made[-1]

    return job


def refuse_sharded(recipe: Recipe, command):
    """Raise InputError where `recipe` is for several processes; command: what plans them."""
    if recipe.memory.sharding is not None:
        raise InputError(
            f"memory.sharding: {recipe.memory.sharding} is for several processes, one a card; plan them with: {command}\n"
            "  or set memory.sharding=null for the plan of one card"
        )
