"""qlora data: what the model will see, before any weight is read."""

from __future__ import annotations

from pathlib import Path

from ..jobs.prepared_data import prepare, refuse_pointless
from ..pages import data as page
from ..recipe import Recipe
from ..system.errors import InputError
from ..system.events import note
from ..terminal import shown
from ..terminal.data import drawn, rendered, say_report
from ..terminal.tables import has_color, show

_ON_PAGE = 20  # rows, from all over the data


@shown()
def inspect_data(recipe: Recipe, row=None, tokens=False, html=None) -> dict:
    """Print rows read and dropped, lengths, the share of tokens trained, and rendered rows; return data_report.json.

    row: the number of the one training row to render, from 1; by default the first two. tokens: show each token's id.
    html: a file to write the report and some rows to, as one page.

    Raises:
        InputError: the recipe or the data is wrong, training would be pointless, or there is no such row.
    """
    prepared = prepare(recipe, weights=False)
    if row is not None and not 1 <= row <= len(prepared.examples):
        raise InputError(f"--row {row}: no such row; the data has rows 1 to {len(prepared.examples)}")
    say_report(prepared)
    bars = page.histogram(prepared.examples.lengths)
    for line in drawn(bars, prepared.report["rows"], recipe.data.max_length):
        show(line)
    steps = prepared.report["steps_per_epoch"]
    show(f"steps     {steps:,} per epoch")
    for number in range(1, min(2, len(prepared.examples)) + 1) if row is None else [row]:
        where = prepared.examples.where(number - 1)
        show(f"\nrow {number} ({where}); {'trained tokens in green' if has_color() else 'trained: [[...]]'}")
        show(rendered(page.pieces(prepared.tokenizer, prepared.examples[number - 1], tokens), tokens))
    if html is not None:
        _write_page(html, prepared, recipe, bars, row)
    refuse_pointless(prepared.report)
    return prepared.report


def _write_page(html, prepared, recipe, bars, row):
    count = len(prepared.examples)
    numbers = sorted({n * (count - 1) // (_ON_PAGE - 1) for n in range(_ON_PAGE)}) if row is None else [row - 1]
    rows = [
        (f"row {n + 1}: {prepared.examples.where(n)}", page.pieces(prepared.tokenizer, prepared.examples[n]))
        for n in numbers
    ]
    title = f"{recipe.model.name_or_path}, {recipe.output_dir}"
    content = page.page(title, prepared.template, prepared.report, bars, recipe.data.max_length, rows)
    try:
        Path(html).write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--html {html}: {error.strerror or error}") from None
    note(f"page      {html}")
