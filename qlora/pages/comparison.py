"""A comparison as files that others read: a table in Markdown and CSV, and two pictures in one PNG."""

from __future__ import annotations

import csv
import functools
import io

from ..evaluation.intervals import OF_LOSS
from ..jobs.reporting.verdicts import number_of
from ..recipe.comparison import NUMBERS, settings_in_words
from ..system.errors import InputError
from ..system.events import note
from ..system.extras import how_to_install
from ..system.units import duration, latency, size
from . import figures, markdown

_COLUMNS = ("variant", "settings", "seed", "status", *NUMBERS, "run", "message")


def as_csv(found) -> str:
    """Return a comparison's rows as CSV, one a training; metrics have a column each."""
    names = sorted({name for row in found["rows"] for name in row["metrics"]})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*_COLUMNS[:4], *names, *_COLUMNS[4:]])
    for row in found["rows"]:
        values = {
            **row,
            "settings": settings_in_words(row["settings"]),
            "message": (row["message"] or "").replace("\n", " "),
        }
        metrics = [row["metrics"].get(name, {}).get("value") for name in names]
        writer.writerow([*(values[name] for name in _COLUMNS[:4]), *metrics, *(values[name] for name in _COLUMNS[4:])])
    return stream.getvalue()


def summary_of(found) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of a comparison's means over seeds, a row for each setting, without columns that are empty."""
    metric = found["metric"]
    further = [name for name in found.get("metrics", ()) if name not in OF_LOSS]
    header = ["variant", "setting", metric.replace("_", " "), "95 %", "spread",
              *(name.replace("_", " ") for name in further), "loss", "forgetting", "time", "peak", "trained", "saved",
              "a token", ""]  # fmt: skip
    rows = [
        [
            one["variant"],
            settings_in_words(one["settings"]),
            number_of(metric, one["mean"]),
            f"{number_of(metric, one['low'])} to {number_of(metric, one['high'])}",
            optional(one["spread"], functools.partial(number_of, metric)),
            *(optional(one["metrics"].get(name), functools.partial(number_of, name)) for name in further),
            "" if metric == "loss" else optional(one["loss"], "{:.4f}".format),
            optional(one["forgetting"], "{:+.4f}".format),
            optional(one["seconds"], duration),
            optional(one["peak_bytes"], size),
            optional(one["trainable_share"], "{:.2%}".format),
            optional(one["saved_bytes"], size),
            optional(one.get("latency_seconds"), latency),
            _verdict(one),
        ]
        for one in found["summary"]
    ]
    kept = [number for number in range(len(header)) if number < 3 or any(row[number] for row in rows)]
    return [header[number] for number in kept], [[row[number] for number in kept] for row in rows]


def optional(value, said):
    """Return said(value), and nothing of what was not measured."""
    return "" if value is None else said(value)


def _verdict(one):
    if one["best"] is True:
        return "best"
    if one["best"]:
        return str(one["best"])
    return "" if one["chosen"] else "another setting is better"


def as_markdown(found) -> str:
    """Return the table of a comparison in Markdown, with the command that makes it and what its words mean."""
    header, lines = summary_of(found)
    if ended := [row for row in found["rows"] if row["status"] != "done"]:
        header = header if header[-1] == "" else [*header, ""]
        lines = [[*line, ""][: len(header)] for line in lines]
        lines += [_ended(row, len(header)) for row in ended]
    table = markdown.table(header, lines)
    return "\n".join([f"# {found['name']}", "", f"    {found['command']}", "", *table, "", *found["notes"], ""])


def _ended(row, num_columns):
    """Return the cells of a training that did not end well: what became of it, and in the last one why."""
    where = f"{settings_in_words(row['settings'])} seed {row['seed']}".strip()
    reason = (row["message"] or "").split("\n")[0][:120]
    return [row["variant"], where, row["status"], *[""] * (num_columns - 4), reason]


def draw(path, found):
    """Draw the metric against peak memory, and by the first field of the sweep, into the PNG `path`.

    Without matplotlib nothing is drawn, and a note says so.

    Raises:
        InputError: the picture cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        note(f"no picture, which needs the package matplotlib; install it:  {how_to_install('plot')}")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fields = [field for one in found["summary"] for field, value in one["settings"].items() if is_number(value)]
    figure, axes = plt.subplots(1, 2 if fields else 1, figsize=(11 if fields else 6, 4.5), squeeze=False)
    variants = list(dict.fromkeys(one["variant"] for one in found["summary"]))
    colors = {name: plt.get_cmap("tab20")(number % 20) for number, name in enumerate(variants)}
    _against_memory(axes[0][0], found, colors)
    if fields:
        _by_setting(axes[0][1], found, colors, fields[0])
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
        one.set_ylabel(found["metric"].replace("_", " "))
        one.grid(alpha=0.25)
    figure.suptitle(
        f"{found['name']}: mean over seeds, 95 % intervals over rows and seeds", x=0.01, ha="left", fontsize=10
    )
    figure.tight_layout()
    try:
        figures.save(figure, path, dpi=110)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    finally:
        plt.close(figure)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _against_memory(axes, found, colors):
    """One point a variant, with its best setting; on the line are those that nothing is better than with less memory."""
    points = [one for one in found["summary"] if one["chosen"] and one["peak_bytes"] is not None]
    for one in points:
        x, middle = one["peak_bytes"] / 2**30, one["mean"]
        axes.errorbar(x, middle, [[max(0, middle - one["low"])], [max(0, one["high"] - middle)]], fmt="o", capsize=2,
                      color=colors[one["variant"]])  # fmt: skip
        axes.annotate(one["variant"], (x, middle), xytext=(5, 5), textcoords="offset points", fontsize=8)
    lower = found["lower_is_better"]
    front, best = [], None
    for one in sorted(points, key=lambda one: (one["peak_bytes"], one["mean"] if lower else -one["mean"])):
        if best is None or (one["mean"] < best if lower else one["mean"] > best):
            best = one["mean"]
            front.append(one)
    axes.step([one["peak_bytes"] / 2**30 for one in front], [one["mean"] for one in front], where="post", color="grey",
              linewidth=1, linestyle="--", zorder=0)  # fmt: skip
    axes.set_xlabel("peak memory of the training, GiB")
    axes.margins(x=0.2)


def _by_setting(axes, found, colors, field):
    values: list = []
    for name, color in colors.items():
        points = sorted(
            (one["settings"][field], one["mean"], one["low"], one["high"])
            for one in found["summary"]
            if one["variant"] == name and is_number(one["settings"].get(field))
        )
        if not points:
            continue
        xs, means, lows, highs = zip(*points, strict=True)
        values += xs
        axes.plot(xs, means, "o-", color=color, label=name, markersize=4)
        axes.fill_between(xs, lows, highs, color=color, alpha=0.12, linewidth=0)
    if min(values) > 0 and max(values) > 5 * min(values):
        axes.set_xscale("log")
        tried = sorted(set(values))
        axes.set_xticks(tried, [f"{value:g}" for value in tried])
        axes.minorticks_off()
    axes.set_xlabel(field)
    axes.legend(fontsize=8, frameon=False)
