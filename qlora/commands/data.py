"""qlora data: what the model will see, before any weight is read."""

from __future__ import annotations

from ..jobs.opening.prepared_data import prepare, refuse_pointless
from ..pages.data import KIND, write_page
from ..recipe import Recipe
from ..system import files
from ..system.errors import InputError
from ..system.events import Found, emit, note
from ..terminal import shown
from ..terminal.data import say_report, show_classes, show_lengths, show_row


@shown()
def inspect_data(recipe: Recipe, row=None, tokens=False, html=None) -> dict:
    """Print rows read and dropped, lengths, the share of tokens trained, and rendered rows; return data_report.json.

    row: the number of the one training row to render, from 1; by default the first two. tokens: show each token's id.
    html: a file to write the report and some rows to, as one page.

    Raises:
        InputError: the recipe or the data is wrong, training would be pointless, or there is no such row.
    """
    if html is not None:
        files.refuse_foreign(html, "--html", KIND)
    prepared = prepare(recipe, weights=False)
    if row is not None and not 1 <= row <= len(prepared.examples):
        raise InputError(f"--row {row}: no such row; the data has rows 1 to {len(prepared.examples)}")
    say_report(prepared)
    show_classes(prepared)
    show_lengths(prepared)
    for number in range(1, min(2, len(prepared.examples)) + 1) if row is None else [row]:
        show_row(prepared, number, tokens)
    emit(Found(prepared.report))
    if html is not None:
        write_page(html, prepared, row)
        note(f"page      {html}")
    refuse_pointless(prepared.report)
    return prepared.report
