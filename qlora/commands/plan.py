"""qlora plan: what training will cost, before a weight is read."""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import planner
from ..jobs.opening.prepared_data import prepared_if_there
from ..jobs.planning.method_plans import advice
from ..jobs.planning.method_plans import plan_methods as plans_of_methods
from ..jobs.planning.plan_job import budget_of, computer_of, is_cpu, job_of, not_supported, without_data
from ..jobs.planning.several_card_plans import fewest, plan_several, refuse_sharded
from ..pages.plan import draw, refuse_picture
from ..planner import several_cards
from ..recipe import Recipe
from ..recipe.tasks import has_classes
from ..system.errors import InputError
from ..system.events import Found, emit, note
from ..system.units import size
from ..terminal import shown
from ..terminal.data import say_report
from ..terminal.plan import say_plan, say_ways
from ..terminal.tables import show, table


@shown()
def plan(recipe: Recipe, vram=None, card=None, plot=None) -> dict:
    """Print the plan of training as `recipe` says; return it with the limits that still fit, and suggestions, for --json.

    vram, card: what to plan for, as text; by default the GPU of this machine, "cpu": its processor.
    plot: a file to draw memory by length into.

    Raises:
        InputError: the recipe, the data, a size or a card is wrong.
    """
    if plot is not None:
        refuse_picture(plot)
    refuse_sharded(recipe, "qlora plan RECIPE --processes 2")
    budget, on = budget_of(recipe, vram, card), computer_of(card)
    prepared = prepared_if_there(recipe, on)
    if prepared is not None:
        say_report(prepared)
    kind = budget.kind
    try:
        job = without_data(recipe, kind, budget, on) if prepared is None else job_of(prepared, kind, budget)
    except planner.NoPlan as error:
        raise not_supported(recipe, error) from None
    if plot is not None and job.outline.counts == "images":
        raise InputError("--plot draws memory by the length of rows, and images are alike; leave it out")
    found = planner.plan(job)
    limits, changes = planner.backwards(job), planner.suggestions(job)
    say_plan(recipe.model.name_or_path, job, found, limits, changes, budget.why, has_classes(recipe.task))
    result = dataclasses.asdict(found) | {"limits": limits, "suggestions": changes}
    emit(Found(result))
    if plot is not None:
        draw(plot, job, recipe.model.name_or_path)
        note(f"plot      {plot}")
    return result


@shown()
def plan_methods(recipe: Recipe, vram=None, card=None) -> dict:
    """Print what each method would cost on a card, and what to take; return {"methods": [...], "advice": [...]}.

    Each method is {"method", "fits", "peak_bytes", "trainable_parameters", "checkpointed_layers", "tokens_per_second",
    "message"}; what is not known is None. vram, card: as of `plan`.

    Raises:
        InputError: the recipe, the data, a size or a card is wrong.
    """
    budget, on = budget_of(recipe, vram, card), computer_of(card)
    prepared = prepared_if_there(recipe, on)
    plans = plans_of_methods(recipe, prepared, budget, on)
    sentences = advice(plans, None if prepared is None else len(prepared.examples))
    found: list[dict[str, Any]] = [
        {
            "method": one.name,
            "fits": one.plan is not None and one.plan.fits,
            "peak_bytes": one.plan and one.plan.peak_bytes,
            "trainable_parameters": one.plan and one.trained,
            "checkpointed_layers": one.plan and one.plan.checkpointed_layers,
            "tokens_per_second": one.plan and one.plan.tokens_per_second,
            "message": one.why_none,
        }
        for one in plans
    ]
    fastest = max((one["tokens_per_second"] or 0 for one in found if one["fits"]), default=0)
    rows = [
        [one["method"], "" if one["peak_bytes"] is None else size(one["peak_bytes"]),
         "yes" if one["fits"] else "no" if one["peak_bytes"] else one["message"],
         "" if one["trainable_parameters"] is None else f"{one['trainable_parameters']:,}",
         "" if one["checkpointed_layers"] is None else str(one["checkpointed_layers"]),
         f"{one['tokens_per_second'] / fastest:.2f}" if one["fits"] and one["tokens_per_second"] and fastest else ""]
        for one in found
    ]  # fmt: skip
    header = ["", "peak", "fits", "trained parameters", "layers checkpointed", "speed at most"]
    table(f"methods on {size(budget.num_bytes)} ({budget.why})", header, rows)
    for sentence in sentences:
        show(sentence)
    return {"methods": found, "advice": sentences}


@shown()
def plan_processes(recipe: Recipe, count: int, vram=None, card=None, link=None) -> dict:
    """Print what `count` cards would make of a step, beside one; return {"processes", "fits", "link_bytes_per_second", "ways",
    "fewest", "advice"}.

    Each way has the fields of planner.several_cards.Way, and of its plan what is of one card; fits: the way that the recipe says,
    by memory.sharding; fewest: where no way fits, that of the fewest cards that would do, None: none does. link: GB/s between
    cards, None: as of the card. vram, card: as of `plan`.

    Raises:
        InputError: the recipe, the data, a size or a card is wrong, or several processes do not do that.
    """
    if is_cpu(card):
        raise InputError("--processes plans several GPUs; give --card a GPU such as 4090")
    budget, on = budget_of(recipe, vram, card), computer_of(card)
    if link is not None and not link > 0:
        raise InputError(f"--link {link:g}: GB/s between two cards, above 0")
    speed = budget.card.link_bandwidth if link is None and budget.card else link and link * 1e9
    prepared = prepared_if_there(recipe, on)
    try:
        ways = plan_several(recipe, prepared, budget, on, count, speed)
        none_fits = not any(way.plan.fits for way in ways)
        more = fewest(recipe, prepared, budget, on, count, speed) if none_fits else None
    except planner.NoPlan as error:
        raise not_supported(recipe, error) from None
    sharding = recipe.memory.sharding
    sentence = several_cards.advice(ways, sharding, more)
    say_ways(recipe, ways, budget, speed, sentence)
    wanted = sharding or several_cards.DATA_PARALLEL
    return {
        "processes": count,
        "fits": any(way.plan.fits for way in ways if way.name == wanted),
        "rows_per_step": recipe.training.rows_per_step,
        "link_bytes_per_second": speed,
        "ways": [_as_json(way) for way in ways],
        "fewest": more and _as_json(more),
        "advice": sentence,
    }


def _as_json(way):
    fields = dataclasses.asdict(way)
    plan = fields.pop("plan")
    kept = (
        "fits",
        "peak_bytes",
        "host_bytes",
        "components",
        "checkpointed_layers",
        "offload",
        "tokens_per_micro_batch",
        "steps",
        "hours",
    )
    return fields | {name: plan[name] for name in kept}
