"""Where the memory of a training goes, by the length of its rows, as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import planner
from ..system import files
from ..system.errors import InputError
from ..system.extras import how_to_install
from . import figures

KIND = "qlora plan"
# under which key a picture says what has made it
_MAKER = {".png": "Software", ".svg": "Creator"}

WORDS = {
    "weights": "weights",
    "adapter": "adapter, float32 masters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "checkpoints": "checkpointed layer inputs",
    "layer_work": "activations of the layers",
    "loss_head": "logits and loss",
    "buffers": "inputs and buffers",
    "context": "context, fragmentation",
}
COLORS = ("#4c72b0", "#55a868", "#c44e52", "#8172b3", "#ccb974", "#64b5cd", "#dd8452", "#8c8c8c", "#d0d0d0")


def refuse_picture(path):
    """Raise InputError where no picture can be drawn into `path`: another ending, another's file, or no matplotlib."""
    if Path(path).suffix.lower() not in _MAKER:
        raise InputError(f"--plot {path}: give a file that ends in .png or .svg")
    files.refuse_foreign(path, "--plot", KIND)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(f"--plot needs the package matplotlib; install it:  {how_to_install('plot')}") from None


def draw(path, job, name):
    """Draw the components of the peak as stacked bars, by sequence length, with the budget as a line; see `refuse_picture`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lengths = _lengths(job)
    plans = [planner.plan(planner.at_length(job, length)) for length in lengths]
    figure, axes = plt.subplots(figsize=(9, 5))
    bottom = np.zeros(len(lengths))
    for name, color in zip(WORDS, COLORS, strict=True):
        heights = np.array([found.components[name] for found in plans]) / 2**30
        if heights.any():
            axes.bar(range(len(lengths)), heights, bottom=bottom, label=WORDS[name], color=color, width=0.72)
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
    axes.set_title(f"Training {name}", loc="left", fontweight="bold")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, reverse=True)
    try:
        maker = {_MAKER[Path(path).suffix.lower()]: KIND}
        figures.save(figure, path, dpi=110, bbox_inches="tight", metadata=maker)
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
