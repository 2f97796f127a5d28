"""qlora plan: what training will cost, before a weight is read."""

from __future__ import annotations

import dataclasses

from .. import planner
from ..jobs.plan_job import budget_of, computer_of, job_of, without_data
from ..jobs.prepared_data import prepared_if_there
from ..pages.plan import draw
from ..recipe import Recipe
from ..recipe.tasks import has_classes
from ..system.errors import InputError
from ..system.events import note
from ..system.units import size
from ..terminal import shown
from ..terminal.data import say_report
from ..terminal.plan import say_plan
from ..terminal.tables import table


@shown()
def list_cards() -> dict:
    """Print the cards that a plan knows, with what a process sees of their memory; return them as {"cards": [...]}."""
    found = planner.cards.listing()
    rows = [
        [one["name"], size(one["memory_bytes"]), f"{one['flops'] / 1e12:.0f}", f"{one['bandwidth'] / 1e9:,.0f}",
         "yes" if one["bfloat16"] else "no"] for one in found
    ]  # fmt: skip
    table("cards, by the memory that a process sees", ["card", "memory", "TFLOPS", "GB/s", "bfloat16"], rows)
    return {"cards": found}


@shown()
def plan(recipe: Recipe, vram=None, card=None, plot=None) -> dict:
    """Print the plan of training as `recipe` says; return it with the limits that still fit, and suggestions, for --json.

    vram, card: what to plan for, as text; by default the GPU of this machine. plot: a file to draw memory by length into.

    Raises:
        InputError: the recipe, the data, a size or a card is wrong.
    """
    budget, on = budget_of(recipe, vram, card), computer_of(card)
    prepared = prepared_if_there(recipe, on)
    if prepared is not None:
        say_report(prepared)
    try:
        job = without_data(recipe, "cuda", budget, on) if prepared is None else job_of(prepared, "cuda", budget)
    except planner.NoPlan as error:
        raise InputError(
            f"{recipe.model.name_or_path}: this architecture is not supported by the planner ({error})"
        ) from None
    if plot is not None and job.outline.counts == "images":
        raise InputError("--plot draws memory by the length of rows, and images are alike; leave it out")
    found = planner.plan(job)
    limits, changes = planner.backwards(job), planner.suggestions(job)
    say_plan(recipe.model.name_or_path, job, found, limits, changes, budget.why, has_classes(recipe.task))
    if plot is not None:
        draw(plot, job, recipe.model.name_or_path)
        note(f"plot      {plot}")
    return dataclasses.asdict(found) | {"limits": limits, "suggestions": changes}
