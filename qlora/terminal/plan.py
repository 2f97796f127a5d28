"""A plan as a person sees it: where the memory goes, whether it fits, and what to change."""

from __future__ import annotations

from rich.text import Text

from ..pages.plan import COLORS, WORDS
from ..system.events import note
from ..system.units import duration, size
from .tables import show, table


def why_no_time(kind, card):
    """Return in words why a plan for a device of `kind`, "cuda" or "cpu", has no speed; "" for a `card` that is known."""
    if kind == "cpu":
        return "not planned for a processor; the training says how long it takes after its first steps"
    return "" if card else "not planned without the card's name: --card NAME; qlora plan --card list has them"


def say_plan(name, job, found, limits, changes, why, has_classes=False):
    """Print a plan: its components as bars, the verdict, the limits and what would help. why: the budget is what it is.
    has_classes: what is trained is a class a row, and no tokens."""
    load = job.load
    counts = job.outline.counts
    rows = f"{load.rows} row{'s' if load.rows > 1 else ''} of {load.length:,} tokens" + (
        ", packed" if load.packed else ""
    )
    if load.joins_steps:
        many = job.training.rows_per_step
        rows = f"{load.length:,} tokens of the {f'{many:,} rows' if many > 1 else 'one row'} of a step{', joined' * (many > 1)}"
    rows = rows if counts == "tokens" else f"{load.rows:,} images"
    trained = "" if has_classes else f", {load.scored:,} tokens trained"
    note(f"plan      {name}: largest micro-batch is {rows}{trained}")
    note(f"budget    {size(job.budget_bytes)} ({why})")
    show("")
    scale = 38 / max(job.budget_bytes, found.peak_bytes)
    for (part, count), color in zip(found.components.items(), COLORS, strict=True):
        if count:
            line = Text(f"  {WORDS[part]:<26}{size(count):>11}  ")
            show(line.append("█" * max(1, round(scale * count)), style=color))
    left = job.budget_bytes - found.peak_bytes
    verdict = f"fits, {size(left)} to spare" if found.fits else f"DOES NOT FIT, {size(-left)} over the budget"
    show(
        Text(
            f"  {'peak':<26}{size(found.peak_bytes):>11}  {verdict}",
            style="bold green" if found.fits else "bold red",
        )
    )
    show(f"  {'':<26}{'':>11}  reached in: {found.where}")
    show("")
    how = f"{found.checkpointed_layers} of {found.num_layers} layers checkpointed"
    if found.offload:
        how += f", layer inputs offloaded to CPU memory ({size(found.host_bytes)})"
    show(f"layers    {how}")
    if found.tokens_per_second is not None:
        time = "" if found.hours is None else f"; {found.steps:,} steps"
        if found.hours is not None and 3600 * found.hours >= 1:
            time += f" in at least {duration(3600 * found.hours)}"
        show(f"speed     at most {found.tokens_per_second:,.0f} {counts}/s on {job.card.name}{time}")
    elif why_none := why_no_time(job.outline.device_kind, job.card):
        show(f"speed     {why_none}")
    show(f"limits    {limits_in_words(limits, 'rows' if counts == 'tokens' else counts, job.positions)}")
    for index, change in enumerate(changes):
        speed = change["tokens_per_second"]
        fit = ", fits" if change["fits"] and not found.fits else ""
        rate = "" if speed is None else f", at most {speed:,.0f} {counts}/s"
        show(f"{'try' if index == 0 else '':<10}{change['set']}: {size(change['peak_bytes'])}{fit}{rate}")


def say_ways(recipe, ways, budget, link, sentence):
    """Print the planner's Ways of training on several cards, what a step is, and the sentence that says whether it pays."""
    many = recipe.training.rows_per_step
    note(f"plan      {recipe.model.name_or_path}: {many:,} row{'s' * (many > 1)} a step, whatever the number of cards")
    speed = "" if link is None else f"; {link / 1e9:.1f} GB/s between cards"
    note(f"budget    {size(budget.num_bytes)} a card ({budget.why}){speed}")
    rows = [
        [f"{way.name}{f' x {way.processes}' if way.processes > 1 else ''}", size(way.plan.peak_bytes),
         "yes" if way.plan.fits else "no", f"{way.plan.checkpointed_layers} of {way.plan.num_layers}", _micro_batches(way),
         size(way.sent_bytes) if way.sent_bytes else "", _seconds(way.compute_seconds), _seconds(way.communication_seconds),
         _seconds(way.step_seconds), "" if way.speedup is None else f"{way.speedup:.2f}"]
        for way in ways
    ]  # fmt: skip
    header = [
        "",
        "peak",
        "fits",
        "checkpointed",
        "micro-batches",
        "sent",
        "computing",
        "sending",
        "step",
        "speed at most",
    ]
    table("a step, of each card; seconds at least", header, rows)
    show(sentence)


def _micro_batches(way):
    tokens = way.plan.tokens_per_micro_batch
    return f"{way.micro_batches}" + ("" if tokens is None else f" of {tokens:,} tokens")


def _seconds(number):
    return "" if number is None or number == 0 else f"{number:.3g} s"


def limits_in_words(limits, rows="rows", positions=None):
    """Return the limits of planner.backwards in words; where rows are joined, a row and a micro-batch may be as long.

    rows: what they are called. positions: the longest row that the model takes, None: it sets no limit.
    """
    if not any(limits.values()):
        return f"none: not even one {'token' if rows == 'rows' else rows.removesuffix('s')} fits"
    words = {"max_length": "rows up to {:,} tokens", "micro_batch": f"{{:,}} {rows} per micro-batch", "r": "r up to {:,}",
             "tokens_per_micro_batch": "joined micro-batches up to {:,} tokens"}  # fmt: skip
    if "max_length" in limits and limits["max_length"] == limits.get("tokens_per_micro_batch"):
        limits = {name: limit for name, limit in limits.items() if name != "tokens_per_micro_batch"}
        words["max_length"] = "rows, or micro-batches of joined rows, up to {:,} tokens"
    if positions is not None and limits.get("max_length") == positions:
        words["max_length"] += " (the model has no more positions)"
    return "; or ".join(words[name].format(limit) for name, limit in limits.items())
