"""qlora plan: what training will cost, before a weight is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from rich.text import Text

from .. import base_model, planner
from ..jobs.plan_job import free_bytes, job_of, without_data
from ..jobs.prepared_data import prepare, say_report
from ..recipe import Recipe, parse_size
from ..system.errors import InputError
from ..terminal import console

_USUAL = 24 * 2**30


def plan(recipe: Recipe, vram=None, card=None, plot=None) -> dict:
    """Print the plan of training as `recipe` says; return it with the limits that still fit, and suggestions, for --json.

    vram, card: what to plan for, as text; by default the GPU of this machine. plot: a file to draw memory by length into.

    Raises:
        InputError: the recipe, the data, a size or a card is wrong.
    """
    budget, chosen, why = _budget(recipe, vram, card)
    try:
        job = _job(recipe, budget, chosen)
    except planner.NoPlan as error:
        raise InputError(
            f"{recipe.model.name_or_path}: this architecture is not supported by the planner ({error})"
        ) from None
    found = planner.plan(job)
    limits, changes = planner.backwards(job), planner.suggestions(job)
    _say(recipe, job, found, limits, changes, why)
    if plot is not None:
        _draw(plot, job, recipe)
        console.say(f"plot      {plot}")
    return dataclasses.asdict(found) | {"limits": limits, "suggestions": changes}


def _budget(recipe, vram, card):
    """Return (bytes, Card or None, a few words on where they are from)."""
    import torch

    chosen = None if card is None else planner.card_of(card)
    if torch.cuda.is_available() and chosen is None:
        chosen = planner.cards.find(torch.cuda.get_device_name())
    for name, text in (("--vram", vram), ("memory.budget", recipe.memory.budget)):
        if text is not None:
            try:
                return parse_size(text), chosen, name
            except ValueError as error:
                raise InputError(f"{name} {text!r}: {error}") from None
    if card is not None and chosen is not None:
        return chosen.memory, chosen, chosen.name
    if torch.cuda.is_available():
        return free_bytes(torch.device("cuda")), chosen, torch.cuda.get_device_name()
    return (
        _USUAL,
        planner.card_of("4090"),
        "no GPU found, so an RTX 4090 is assumed; change it with --card, --vram or memory.budget",
    )


def _job(recipe, budget, card):
    """Return the Job of `recipe` on a GPU; without data or tokenizer, one of rows of data.max_length."""
    paths = [source.path for source in recipe.data.train if source.path is not None]
    absent = [path for path in paths if not any(letter in path for letter in "*?[") and not Path(path).exists()]
    checkpoint = base_model.find(recipe.model, weights=False)
    if base_model.whole_config(checkpoint.folder) is not None:
        console.say("model     a multimodal checkpoint: planning the text half, which is what is trained")
    if not absent and (checkpoint.folder / "tokenizer.json").is_file():
        prepared = prepare(recipe, weights=False)
        say_report(prepared)
        return job_of(prepared.recipe, prepared, "cuda", budget, card)
    why = f"no file at {absent[0]}" if absent else f"{checkpoint.folder} has no tokenizer.json"
    console.say(f"data      {why}: assuming rows of data.max_length tokens, all of them trained")
    config = base_model.load_config(checkpoint, recipe.model)
    recipe = base_model.settle(recipe, config, checkpoint)
    return without_data(recipe, config, len(checkpoint.new_tokens), "cuda", budget, card)


# ---- printing --------------------------------------------------------------------------------------------------------

_WORDS = {
    "weights": "weights",
    "adapter": "adapter, float32 masters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "checkpoints": "checkpointed layer inputs",
    "layer_work": "activations of the layers",
    "loss_head": "logits and loss",
    "buffers": "inputs and buffers",
    "context": "CUDA context (assumed)",
}
_COLORS = ("#4c72b0", "#55a868", "#c44e52", "#8172b3", "#ccb974", "#64b5cd", "#dd8452", "#8c8c8c", "#d0d0d0")


def _say(recipe, job, found, limits, changes, why):
    load, show = job.load, console.show
    rows = f"{load.rows} row{'s' if load.rows > 1 else ''} of {load.length:,} tokens" + (
        ", packed" if load.packed else ""
    )
    console.say(f"plan      {recipe.model.name_or_path}: largest micro-batch is {rows}, {load.scored:,} tokens trained")
    console.say(f"budget    {console.size(job.budget_bytes)} ({why})")
    show("")
    scale = 38 / max(job.budget_bytes, found.peak_bytes)
    for (name, count), color in zip(found.components.items(), _COLORS, strict=True):
        if count:
            line = Text(f"  {_WORDS[name]:<26}{console.size(count):>11}  ")
            show(line.append("█" * max(1, round(scale * count)), style=color))
    left = job.budget_bytes - found.peak_bytes
    verdict = (
        f"fits, {console.size(left)} to spare" if found.fits else f"DOES NOT FIT, {console.size(-left)} over the budget"
    )
    show(
        Text(
            f"  {'peak':<26}{console.size(found.peak_bytes):>11}  {verdict}",
            style="bold green" if found.fits else "bold red",
        )
    )
    show(f"  {'':<26}{'':>11}  reached in: {found.where}")
    show("")
    how = f"{found.checkpointed_layers} of {found.num_layers} layers checkpointed"
    if found.offload:
        how += f", layer inputs offloaded to CPU memory ({console.size(found.host_bytes)})"
    show(f"layers    {how}")
    if found.tokens_per_second is not None:
        time = "" if found.hours is None else f"; {found.steps:,} steps"
        if found.hours is not None and 3600 * found.hours >= 1:
            time += f" in at least {console.duration(3600 * found.hours)}"
        show(f"speed     at most {found.tokens_per_second:,.0f} tokens/s on {job.card.name}{time}")
    words = {"max_length": "rows up to {:,} tokens", "micro_batch": "{:,} rows per micro-batch", "r": "r up to {:,}"}
    show("limits    " + "; or ".join(words[name].format(limit) for name, limit in limits.items()))
    for index, change in enumerate(changes):
        speed = change["tokens_per_second"]
        fit = "" if change["fits"] == found.fits else ", fits" if change["fits"] else ""
        rate = "" if speed is None else f", at most {speed:,.0f} tokens/s"
        show(f"{'try' if index == 0 else '':<10}{change['set']}: {console.size(change['peak_bytes'])}{fit}{rate}")


def _draw(path, job, recipe):
    """Draw the components of the peak as stacked bars, by sequence length, with the budget as a line."""
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {path}: give a file that ends in .png, .svg or .pdf")
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lengths = _lengths(job)
    plans = [planner.plan(planner.at_length(job, length)) for length in lengths]
    figure, axes = plt.subplots(figsize=(9, 5))
    bottom = np.zeros(len(lengths))
    for name, color in zip(_WORDS, _COLORS, strict=True):
        heights = np.array([found.components[name] for found in plans]) / 2**30
        if heights.any():
            axes.bar(range(len(lengths)), heights, bottom=bottom, label=_WORDS[name], color=color, width=0.72)
        bottom += heights
    budget = job.budget_bytes / 2**30
    axes.axhline(budget, color="black", linestyle="--", linewidth=1)
    axes.text(-0.45, budget, f"budget {budget:.1f} GiB", ha="left", va="bottom")
    for index, (top, found) in enumerate(zip(bottom, plans, strict=True)):
        axes.text(
            index, top, f"{top:.1f}\n{found.checkpointed_layers} ckpt", ha="center", va="bottom", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            color="black" if found.fits else "#c44e52",
        )  # fmt: skip
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.get_xticklabels()[lengths.index(job.load.longest)].set_fontweight("bold")
    axes.set_xlabel(
        f"tokens in the longest row (bold: this recipe), {job.load.rows} per micro-batch; ckpt: layers checkpointed"
    )
    axes.set_ylabel("peak memory, GiB")
    axes.set_ylim(0, 1.18 * max(budget, bottom.max()))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"Training {recipe.model.name_or_path}", loc="left", fontweight="bold")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, reverse=True)
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except OSError as error:
        raise InputError(f"--plot {path}: {error.strerror or error}") from None
    finally:
        plt.close(figure)


def _lengths(job):
    """Return this job's length with powers of two around it."""
    powers = [2**power for power in range(5, 22)]
    longest = job.load.longest
    nearest = min(range(len(powers)), key=lambda index: abs(np.log2(powers[index] / longest)))
    near = [length for length in powers[max(0, nearest - 3) : nearest + 4] if length != longest]
    return sorted({*near, longest})
