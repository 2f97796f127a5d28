"""An export as a person sees it: the proof as a table, what storage has cost, which base is better."""

from __future__ import annotations

from ..exporter.report import columns, scores, scores_beside
from ..system.events import note
from ..system.units import duration, size
from .tables import table

_FEW_POSITIONS = 250  # at 250, a top-1 agreement of 99 % is 2 positions


def show_proof(report):
    """Show the scores of an export_report.json that was compared with the live model."""
    table(_title(report), columns(report), scores_beside(report) if "beside" in report else scores(report))


def _title(report):
    count = report["rows"]
    few = "; too few to show small differences, --data FILE takes more rows"
    positions = count["positions"]
    if "labels" in report:
        return f"proof on {count['count']} {count['from']}, {len(report['labels'])} classes"
    return (
        f"proof on {count['count']} {count['from']}, {positions} positions{few if positions <= _FEW_POSITIONS else ''}"
    )


def warn(report):
    """Say what storing the model in its dtype cost, where that is much."""
    cast, dtype = report["cast"], report["dtype"]
    if cast["loss"] is not None and cast["loss"] > cast["limit"]:
        remedy = {
            "bfloat16": "--dtype float16 keeps 8 times as much, float32 all",
            "float16": "--dtype float32 keeps all",
        }
        note(
            f"WARNING   storing in {dtype} loses {cast['loss']:.0%} of what training changed (the worst: "
            f"{cast['worst']['name']}, {cast['worst']['cast_loss']:.0%}); {remedy.get(dtype, '')}"
        )
    if cast["underflows"]:
        name, count = max(cast["underflows"].items(), key=lambda item: item[1])
        note(
            f"          {sum(cast['underflows'].values()):,} values underflow to 0 in {dtype}, "
            f"the most in {name} ({count:,})"
        )


def advise(report):
    """Say which base is the better one, where both were compared."""
    for how in ("served in", report["dtype"]):
        pair = [one for one in report.get("comparison", ()) if how in one["model"]]
        if pair:
            best, worse = sorted(pair, key=lambda one: one["loss"])
            where = best["model"].partition(", ")[2]
            note(
                f"better    {where}: the {best['model'].split()[0]} base, loss {best['loss']:.4f} against {worse['loss']:.4f}"
            )


def say_done(report, out):
    """Say what the export in folder `out` is now."""
    verdict = "proven" if report["verified"] else "NOT VERIFIED (export.verify: off)"
    if report["verified"] and report["live_model"] == "assumed":
        verdict = "matches the assumed model; what the adapter was really trained on is not recorded"
    what = "the adapter alone, to serve beside its base," if report["base"] == "beside" else "the model"
    note(f"{verdict}; {what} is in {out}: {size(report['bytes'])}, {duration(report['seconds'])}")
