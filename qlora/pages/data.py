"""What the model will see, as pieces of text and as one page of HTML that needs nothing else."""

from __future__ import annotations

import itertools

from ..data.labels import BY_PLACE
from ..data.masked_examples import IGNORE_INDEX
from ..system.errors import InputError
from ..system.storage import write_text
from . import images
from .html import render

KIND = "qlora data"  # of <meta name="generator">

_SHOWN = 20  # rows of a page, from all over the data
_MUCH_LONGER, _MOST_LONGER = 1.5, 0.7  # times as many tokens, share of the pairs


def pieces(tokenizer, example, one_by_one=False):
    """Return [(text, ids, trained, special), ...] of the row: its longest runs of one kind, or its tokens.

    Of an example with one label no token is trained.
    """
    labels = getattr(example, "labels", None) or [IGNORE_INDEX] * len(example.input_ids)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = [
        (token, label != IGNORE_INDEX, token in special) for token, label in zip(example.input_ids, labels, strict=True)
    ]
    if one_by_one:
        groups = [[token] for token in tokens]
    else:
        groups = [list(group) for _, group in itertools.groupby(tokens, key=lambda token: token[1:])]
    return [
        (_visible(tokenizer.decode(ids)), ids, *group[0][1:]) for group in groups for ids in [[t for t, *_ in group]]
    ]


def _visible(text):
    """A terminal must not obey what a row holds."""
    return text.replace("\x1b", "␛")


def altered(source):
    """Return lines on what of a source's rows is not in the conversations as it is in the file.

    source: an entry of a report's "sources".
    """
    lines = []
    if source["unused"]:
        lines.append("unused keys: " + ", ".join(f"{key} ({count:,} rows)" for key, count in source["unused"].items()))
    if source.get("rows_merged"):
        lines.append(f"{source['rows_merged']:,} rows had consecutive assistant messages merged into one turn")
    if source.get("rows_without_thoughts"):
        lines.append(f"{source['rows_without_thoughts']:,} rows had their thoughts removed (data.thoughts=drop)")
    if source.get("rows_with_control"):
        lines.append(
            f"{source['rows_with_control']:,} rows HOLD SPECIAL TOKENS of the model, which stay text: rows that are in the "
            "template already would get it twice; give messages, or prompt and completion without it"
        )
    if source.get("conversations_by_answer"):
        times = source["tokens_by_answer"] / source["tokens_of_conversations"]
        lines.append(
            f"{source['conversations_by_answer']:,} conversations became {source['answers_by_answer']:,} training rows, one per "
            f"answer ({times:.1f}x the tokens): the template shows earlier turns differently once later ones follow, or an "
            "answer's first characters would merge with the prompt; data.train_on=last_assistant trains on last answers only"
        )
    if source.get("rows_with_nulls"):
        lines.append(
            f"{source['rows_with_nulls']:,} rows had null fields removed from tool calls or tool schemas (to keep them, "
            "write arguments and tools as JSON strings)"
        )
    if source.get(BY_PLACE):
        lines.append(
            f"{source[BY_PLACE]:,} rows have a NUMBER FOR THEIR CLASS, its place in data.labels: 0 is the first"
        )
    for count, what in (
        ("images_rotated", "were turned upright, as their EXIF orientation says"),
        ("images_converted", "were converted to RGB from greyscale, a palette or CMYK"),
        (
            "images_transparent",
            "have transparency, which is left out: the colours behind it show, as in transformers' pipeline",
        ),
    ):
        if source.get(count):
            lines.append(f"{source[count]:,} images {what}")
    return lines


def copies(report):
    """Return lines on rows that repeat others, and on held-out ones that are trained on. report: all or part of
    data_report.json, here and in `contradictions`."""
    found = []
    if report.get("duplicates"):
        found.append(f"{report['duplicates']:,} duplicate rows (kept)")
    if report.get("eval_rows_in_training"):
        what = "HELD-OUT PROMPTS" if report.get("preference") or report.get("judged") else "HELD-OUT ROWS"
        found.append(f"{report['eval_rows_in_training']:,} {what} ARE ALSO TRAINED ON, so their score means nothing")
    return found


def contradictions(report):
    """Return lines on what rows say against each other or against themselves: in classes, pairs, good and bad answers; and on
    pairs whose preferred answer is most often the longer one: that is learned then."""
    found = []
    if report.get("contradictory"):
        found.append(f"{report['contradictory']:,} rows say the same as another row with ANOTHER LABEL")
    if pairs := report.get("preference"):
        chosen, rejected, longer = (pairs.get(key, 0) for key in ("chosen_tokens", "rejected_tokens", "chosen_longer"))
        if chosen > _MUCH_LONGER * rejected and longer > _MOST_LONGER:
            found.append("CHOSEN ANSWERS ARE MUCH LONGER: the model may learn to answer at length, and little else")
        for key, what in (
            ("tied", "score both answers alike"),
            ("reversed", "score the rejected answer HIGHER"),
            ("contradictory", "say the same as another row with CHOSEN AND REJECTED SWAPPED"),
        ):
            if pairs.get(key):  # runs of older versions lack some
                found.append(f"{pairs[key]:,} rows {what}")
    if (answers := report.get("judged")) and answers.get("contradictory"):
        found.append(f"{answers['contradictory']:,} answers are called GOOD AND BAD")
    return found


def warnings_of(report):
    """Return what a page warns of in the rows of a report, see `copies` and `contradictions`."""
    return [*copies(report), *contradictions(report)]


def page(title, template, report, max_length, rows, pictures=()):
    """Return the HTML of a report. rows: [(where, pieces of the row), ...] to show; pictures: [(where, label, address of a
    small image), ...] instead, and no lengths are shown."""
    return render(
        "data.html",
        title=title,
        template=template,
        kind=KIND,
        report=report,
        warnings=warnings_of(report),
        altered=[(source["path"], altered(source)) for source in report["sources"]],
        max_length=max_length,
        rows=[(where, [(text, trained, special) for text, _, trained, special in row]) for where, row in rows],
        pictures=pictures,
        sizes=images.sizes_in_words(report["image_sizes"]) if "image_sizes" in report else "",
    )


def _label(prepared, example):
    """Return in words which class an example has, "" of one without."""
    return f", label {prepared.recipe.data.labels[example.label]}" if prepared.recipe.data.labels else ""


def write_page(file, prepared, row=None):
    """Write the page of Prepared data, with some of its rows, or the one numbered `row` (from 1), to `file`.

    Raises:
        InputError: it cannot be written.
    """
    recipe, rows = prepared.recipe, prepared.examples
    of_images = not prepared.checkpoint.task.file.HAS_TOKENS
    most = images.SHOWN if of_images else _SHOWN
    numbers = {n * (len(rows) - 1) // (most - 1) for n in range(most)} if row is None else {row - 1}
    pictures = [
        (f"row {n + 1}: {rows[n].path}", recipe.data.labels[rows[n].label], images.thumbnail(rows[n]))
        for n in sorted(numbers) if of_images
    ]  # fmt: skip
    shown = (
        []
        if of_images
        else [
            (f"row {n + 1}: {rows.where(n)}{_label(prepared, rows[n])}", pieces(prepared.tokenizer, rows[n]))
            for n in sorted(numbers)
        ]
    )
    title = f"{recipe.model.name_or_path}, {recipe.output_dir}"
    content = page(title, prepared.template, prepared.report, recipe.data.max_length, shown, pictures)
    try:
        write_text(file, content)
    except OSError as error:
        raise InputError(f"--html {file}: {error.strerror or error}") from None
