"""Parts of export_report.json, and its table of scores."""

from __future__ import annotations

import math

from ..evaluation import metrics
from . import merge

_COLUMNS = ["", "loss", "perplexity", "KL to trained", "same top-1"]
_COLUMNS_OF_CLASSES = ["", "loss", "logits apart", "KL to trained", "same class"]


def columns(report):
    """Return the header of the table of `scores`."""
    return _COLUMNS_OF_CLASSES if "labels" in report else _COLUMNS


def of_merging(merging, num_quantized):
    """Return the part of the report that says, for each module and for the whole, what merging and casting changed.

    merging: a merge.Merge that has written all. num_quantized: layers of the base that were quantized in training.
    """
    total = {key: math.sqrt(sum(one[key] ** 2 for one in merging.modules)) for key in ("delta_norm", "cast_error")}
    lossy = [one for one in merging.modules if one["cast_loss"] is not None]
    worst = max(lossy, key=lambda one: one["cast_loss"], default=None)
    return {
        "modules": merging.modules,
        "cast": {
            "loss": total["cast_error"] / total["delta_norm"] if total["delta_norm"] else None,
            "limit": merge.CAST_LOSS_LIMIT,
            "worst": {key: worst[key] for key in ("name", "cast_loss")} if worst else None,
            "underflows": merging.underflows,
        },
        "quantized": {"modules": num_quantized, "same_codes_as_training": len(merging.digests)},
    }


def _row(name, loss, kl=None, top1=None, logits=None, of_classes=False):
    second = ("" if logits is None else f"{logits:.1e}") if of_classes else f"{metrics.perplexity(loss):.3f}"
    return [name, f"{loss:.4f}", second, "" if kl is None else f"{kl:.1e}", "" if top1 is None else f"{top1:.2%}"]


def scores_beside(report):
    """Return what `scores` does, of an adapter that stays beside its base."""
    live, kind = report["live_model"], (report["serve_with"]["quantization"] or {}).get("quant_type", "16 bit")
    scored = [
        (f"exported, beside the base in {kind}", report["beside"]),
        ("exported, beside the base in 16 bit", report["beside_original"]),
        ("base, without the adapter", report["base_model"]),
    ]
    return [
        _row(f"{'assumed' if live == 'assumed' else 'trained'} (base in {kind}, live)", report["live"]["loss"]),
        *(_row(name, one["loss"], one["kl"], one["top1"]) for name, one in scored if one),
    ]


def scores(report):
    """Return the rows of the table that is shown and goes into the model card, as `columns` has them."""
    of_classes = "labels" in report
    quantized = "quantized" if report["quantized"]["modules"] else "base"
    written = f"{report['base']} base, {report['dtype']}"
    merged_into = f", {report['base']} base" if report["quantized"]["modules"] else ""  # else there is but one
    scored = [
        (
            f"{'merged' if 'int8' in report else 'exported'} ({report['dtype']}{merged_into})",
            report["merged"],
        ),
        *(
            [("exported (dynamic int8 of that)", report["int8"])]
            if report.get("int8", {}).get("kl") is not None
            else []
        ),
        *((one["model"], one) for one in report.get("comparison", ()) if one["model"] != written),
        ("base, under a new head" if of_classes else "base, without the adapter", report["base_model"]),
    ]
    return [
        _row(
            f"{'assumed' if report['live_model'] == 'assumed' else 'trained'} ({quantized} + adapter, live)",
            report["live"]["loss"],
            of_classes=of_classes,
        ),
        *(_row(name, one["loss"], one["kl"], one["top1"], one.get("logits"), of_classes) for name, one in scored),
    ]
