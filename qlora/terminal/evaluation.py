"""The scores of an evaluation, as tables."""

from __future__ import annotations

from .classes import show_classes
from .tables import show, table


def show_result(target, result):
    """Show what `evaluate` returns: before and after of a run, or a model's own."""
    classes = result.get("labels")
    before = result.get("before")
    columns = [before, result] if before else [result]
    header = (
        ["", "base under a new head" if classes else "before", "after", "change", "95 %"]
        if before
        else ["", str(target), "95 %"]
    )
    rows = []
    for name in ("loss", *result["metrics"]):
        of_metric = name in result["metrics"]
        number = "{:.1%}".format if of_metric else "{:.4f}".format
        values = [column["metrics"][name]["value"] if of_metric else column[name] for column in columns]
        row = [name.replace("_", " "), *map(number, values)]
        if before:
            change = result["change"][name]
            signed = "{:+.1%}".format if of_metric else "{:+.4f}".format
            row += [signed(change["value"]), f"{signed(change['low'])} to {signed(change['high'])}"]
        else:
            low, high = (
                (result["metrics"][name]["low"], result["metrics"][name]["high"])
                if of_metric
                else result["loss_interval"]
            )
            row.append(f"{number(low)} to {number(high)}")
        rows.append(row)
        if name == "loss" and not classes:
            rows.append(
                ["perplexity", *(f"{column['perplexity']:.4f}" for column in columns), *[""] * (2 if before else 1)]
            )
    of = f"{len(classes)} classes" if classes else f"{result['tokens']} answer tokens"
    table(f"{result['rows']:,} held-out rows, {of}", header, rows)
    if classes:
        show_classes(result)
    if found := result.get("forgetting"):
        rise = (
            f", {found['value']:+.4f} by the training ({found['low']:+.4f} to {found['high']:+.4f})" if before else ""
        )
        show(f"forgetting  loss {found['after']:.4f} on text that was not trained on ({found['data']}){rise}")
    if found := result.get("latency"):
        show(f"latency     {found['token']:.4f} s a token, {found['first_token']:.4f} s to the first")
