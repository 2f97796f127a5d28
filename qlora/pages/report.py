"""A report as one page: what a value of jobs/reporting/reported.py says, in words, tables and charts."""

from __future__ import annotations

import json
from types import SimpleNamespace

from markupsafe import Markup

from ..evaluation.intervals import OF_LOSS, is_share
from ..evaluation.judge import win_rate_in_words
from ..jobs.reporting.verdicts import change_in_words, number_of
from ..recipe.comparison import settings_in_words
from ..system.units import duration, latency, size
from . import charts, comparison, marked, served
from .data import warnings_of
from .html import render

_LARGEST = 1_900_000  # bytes of a page
_COMPONENTS = {
    "process": "the process before (Python, torch)",
    "weights": "weights",
    "adapter": "adapter and masters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "checkpoints": "checkpointed inputs",
    "layer_work": "activations",
    "loss_head": "loss and logits",
    "buffers": "buffers",
    "context": "context, holes",
}


def page(found) -> tuple[str, dict]:
    """Return (HTML, the value it was made of): `found` of reported.gather, with fewer answers where the page would be too
    large; how many are left out is said."""
    while True:
        text = render("report.html", found=found, title=_title(found), words=_WORDS, charts=_CHARTS)
        most = max((len(_shown(run)) for run in found["runs"]), default=0)
        if len(text.encode("utf-8")) <= _LARGEST or most <= 1:
            return text, found
        found = found | {"runs": [_with_fewer(run, most // 2) for run in found["runs"]]}


def _shown(run):
    return run["answers"].get("shown", ())


def _with_fewer(run, most):
    if len(_shown(run)) <= most:
        return run
    left = run["answers"]["rows"] - most
    return run | {"answers": run["answers"] | {"shown": _shown(run)[:most], "left_out": left}}


def _title(found):
    if found["comparison"]:
        return f"Comparison {found['comparison']['folder']}"
    if len(found["runs"]) == 1:
        return found["runs"][0]["path"]
    return f"{len(found['names'])} runs"


# ---- words -----------------------------------------------------------------------------------------------------------


def _number(name, value):
    return "" if value is None else number_of(name, value)


def _counts(run):
    return "images" if run["task"] == "image-classification" else "tokens"


def _components(memory):
    """Return [(name, predicted bytes, measured bytes)], without what is 0."""
    predicted, measured = memory["predicted_components"] or {}, memory["measured_components"] or {}
    names = [name for name in {**predicted, **measured} if predicted.get(name) or measured.get(name)]
    return [(_COMPONENTS.get(name, name), predicted.get(name), measured.get(name)) for name in names]


def _data_facts(data):
    tokens, length = data["tokens"], data.get("length")
    found = [(f"{data['rows']:,}", "rows to train on"), (f"{data['eval_rows']:,}", "rows held out")]
    if "image_sizes" not in data:
        found.append((f"{tokens['total']:,}", "tokens"))
        if tokens.get("trained") is not None and tokens["total"]:
            found.append((f"{tokens['trained'] / tokens['total']:.0%}", "of tokens trained"))
        if length:
            found.append((f"{length['p50']:,} / {length['p95']:,} / {length['max']:,}", "length p50 / p95 / max"))
    if data.get("ends_with_stop_token") is not None:
        found.append((f"{data['ends_with_stop_token']:.0%}", "of rows end with a stop token"))
    if data.get("packing_efficiency") is not None:
        found.append((f"{data['packing_efficiency']:.0%}", "of packed rows filled"))
    return [*found, (f"{data['steps_per_epoch']:,}", "steps an epoch")]


def _before(run):
    return "before" if run["task"] == "text-generation" else "base under a new head"


def _scores(scores):
    """Return [(name, before, after, change in words)], the first two {"value", "low", "high"}."""

    def of_loss(side, name):
        low, high = side.get(f"{name}_interval") or (None, None)
        return None if side.get(name) is None else {"value": side[name], "low": low, "high": high}

    before, change = scores["before"] or {}, scores["change"] or {}
    rows = [(name, of_loss(before, name), of_loss(scores, name)) for name in OF_LOSS if scores.get(name) is not None]
    rows += [
        (name, (before.get("metrics") or {}).get(name), metric) for name, metric in (scores["metrics"] or {}).items()
    ]
    return [
        (name, then, now, change_in_words(name, change[name]) if name in change else "") for name, then, now in rows
    ]


def _cell(value):
    if value is None:
        return "none"
    text = (
        f"{value:g}"
        if isinstance(value, float)
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
    )
    return text if len(text) <= 80 else f"{text[:77]}..."


def _differences(names, rows):
    """Return (header, rows) of what differs, [name, of a run, ...] each: a column a run; of more runs than names a row a run."""
    table = [["", *names], *([name, *map(_cell, values)] for name, *values in rows)]
    header, *lines = map(list, zip(*table, strict=True)) if len(names) > len(rows) else table
    return header, lines


def _comparison(found):
    """Return (names of the columns, [{"cells", "best", "low", "mean", "high", "ends"}]) of a comparison's summary."""
    names, rows = comparison.summary_of(found)
    ends = [end for one in found["summary"] for end in (one["low"], one["high"])]
    return names, [
        {"cells": cells, "best": one["best"] is True, "low": one["low"], "mean": one["mean"], "high": one["high"],
         "ends": (min(ends), max(ends))} for one, cells in zip(found["summary"], rows, strict=True)
    ]  # fmt: skip


def _with_interval(name, one):
    low, value, high = (_number(name, one[key]) for key in ("low", "value", "high"))
    return f"{value} ({low} to {high})" if low else value


def _side_by_side(runs):
    metrics = list(dict.fromkeys(name for run in runs for name in run["scores"].get("metrics") or ()))
    rows = []
    for run in runs:
        scores, memory = run["scores"], run["memory"]
        held_out = run["curves"].get("eval_loss")
        values = [(scores.get("metrics") or {}).get(name) for name in metrics]
        shown = ["" if one is None else _with_interval(name, one) for name, one in zip(metrics, values, strict=True)]
        rows.append(
            [run["name"], run["method"], run["state"]["what"], *shown, _number("loss", scores.get("loss")),
             "" if not held_out else _held_out(run, held_out), comparison.optional(run["speed"].get("seconds"), duration),
             comparison.optional(memory.get("peak_bytes"), size), run["verdicts"][0]["answer"]]
        )  # fmt: skip
    names = ["run", "method", "state", *(name.replace("_", " ") for name in metrics), "loss (eval)", "held-out loss (training)",
             "time", "peak", "learned"]  # fmt: skip
    return names, rows


def _held_out(run, losses):
    """Return the held-out loss of the adapter: that of the last evaluation, or of the best where that is loaded."""
    best = run["best"]
    return (
        f"{best['eval_loss']:.4f} (step {best['best_step']:,})" if best and best["loaded"] else f"{losses[-1][1]:.4f}"
    )


def _best(run):
    best, loss = run["best"], run["best"]["metric"] == "eval_loss"
    name = "held-out loss" if loss else best["metric"].removeprefix("eval_")
    value = number_of("loss" if loss else name, best["value"])
    kept = (
        "the adapter is that of this step"
        if best["loaded"]
        else f"the adapter is that of the last step, {best['step']:,}"
    )
    words = f"Best evaluation: step {best['best_step']:,}, {name} {value}; {kept}."
    if best["loaded"]:
        words += " It was chosen by these held-out rows, so that its score on them is a little too good."
    if best["stopped_after"] is not None:
        words += f" The training ended after {best['stopped_after']} evaluations that were no better."
    return words


def _served(found):
    return served.COLUMNS, served.table_of(found)


def _served_remarks(found):
    return [*served.remarks(found), *found["notes"]]


_WORDS = SimpleNamespace(
    number=_number, counts=_counts, components=_components, data_facts=_data_facts, before=_before, scores=_scores,
    settings=settings_in_words, differences=_differences, comparison=_comparison, side_by_side=_side_by_side,
    change=change_in_words, differing=marked.pieces, best=_best, served=_served, served_remarks=_served_remarks,
    win_rate=win_rate_in_words, latency=latency, data_warnings=warnings_of,
)  # fmt: skip

# ---- charts ----------------------------------------------------------------------------------------------------------

_SHOWN = {  # of a curve: its title, a value as text, whether its axis begins at 0
    "loss": ("loss", charts.number, False),
    "eval_loss": ("held-out loss", charts.number, False),
    "learning_rate": ("learning rate", charts.number, True),
    "grad_norm": ("gradient norm", charts.number, True),
    "tokens_per_second": ("tokens a second", charts.number, True),
    "memory_gib": ("memory, GiB", charts.number, True),
}


def _in_gib(curves):
    return {("memory_gib" if key == "memory_bytes" else key):
            [[step, value / 2**30] for step, value in points] if key == "memory_bytes" else points
            for key, points in curves.items()}  # fmt: skip


def _of_run(run):
    """Return the charts of one run: losses in one; what a method measures beside, in its own."""
    curves = _in_gib(run["curves"])
    losses = [charts.Line(name, curves.get(key, []), n) for n, (key, name) in enumerate(_LOSSES)]
    title = "loss, nats a token" if run["task"] == "text-generation" else "loss, nats a row"
    best = run["best"]
    mark = best and (best["best_step"], "best")
    measured = best and best["metric"].removeprefix("eval_")  # the name of its curve, but that of the loss
    found = [charts.chart(title, losses, has_legend=True, mark=mark)]
    for key in [*_SHOWN, *(name for name in curves if name not in _SHOWN)]:
        if key not in ("loss", "eval_loss"):
            title, form, zero = _SHOWN.get(key, (key.replace("_", " "), charts.number, False))
            title = title.replace("tokens", _counts(run))
            line = charts.Line(title, curves.get(key, []))
            here = mark if key == measured else None
            found.append(charts.chart(title, [line], form=form, zero=zero, mark=here))
    return [one for one in found if one]


_LOSSES = (("loss", "training"), ("eval_loss", "held out"))


def _of_norms(norms):
    rows = [
        charts.Line(
            name, [(layer, value) for layer, value in zip(norms["layers"], values, strict=True) if value is not None], n
        )
        for n, (name, values) in enumerate(norms["modules"].items())
    ]
    return charts.chart("norm by layer", rows, x="layer", zero=True, has_legend=True)


def _groups(curves):
    return {name: n for n, name in enumerate(dict.fromkeys(one["group"] for one in curves))}


def _together(curves):
    numbers = _groups(curves)
    for key, (title, form, zero) in _SHOWN.items():
        lines = [charts.Line(one["name"], _in_gib(one["curves"]).get(key, []), numbers[one["group"]]) for one in curves]
        if figure := charts.chart(title, lines, form=form, zero=zero):
            yield figure


def _legend_of_curves(curves):
    return charts.legend(list(_groups(curves).items()))


def _variants(found):
    return {name: n for n, name in enumerate(dict.fromkeys(one["variant"] for one in found["summary"]))}


def _of_comparison(found):
    """Return the metric against peak memory, and by the first field of the sweep that is a number."""
    variants, title = _variants(found), found["metric"].replace("_", " ")

    def form(value):
        return f"{100 * value:.3g}%" if is_share(found["metric"]) else charts.number(value)

    points = [
        charts.Line(one["variant"], [(one["peak_bytes"] / 2**30, one["mean"])], variants[one["variant"]], dots=True)
        for one in found["summary"]
        if one["chosen"] and one["peak_bytes"] is not None
    ]
    figures = [charts.chart(f"{title} against peak memory", points, x="GiB", form=form)]
    fields = dict.fromkeys(
        field for one in found["summary"] for field, value in one["settings"].items() if comparison.is_number(value)
    )
    for field in list(fields)[:2]:
        lines = [
            charts.Line(
                name,
                sorted(
                    (one["settings"][field], one["mean"])
                    for one in found["summary"]
                    if one["variant"] == name and comparison.is_number(one["settings"].get(field))
                ),
                number,
            )
            for name, number in variants.items()
        ]
        figures.append(charts.chart(f"{title} by {field}", lines, x=field, form=form, log_x=True))
    return [one for one in figures if one]


def _legend_of_comparison(found):
    return charts.legend(list(_variants(found).items()))


def _range(one):
    """Return an interval as a small bar, on the range of all of them."""
    least, most = one["ends"]
    low, mean, high = (
        100 * (one[key] - least) / (most - least) if most > least else 50 for key in ("low", "mean", "high")
    )
    line = f'<i style="left:{low:.1f}%;width:{max(0.5, high - low):.1f}%"></i>'
    return Markup(f'<div class="range">{line}<b style="left:{mean:.1f}%"></b></div>')


_CHARTS = SimpleNamespace(
    of_run=_of_run, of_norms=_of_norms, together=_together, legend_of_curves=_legend_of_curves,
    of_comparison=_of_comparison, legend_of_comparison=_legend_of_comparison, range=_range,
)  # fmt: skip
