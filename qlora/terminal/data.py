"""What the model will see, as a person sees it: a few lines, lengths drawn, rows with what is trained marked."""

from __future__ import annotations

from rich.text import Text

from .. import data
from ..data import preference
from ..jobs.opening.prepared_data import dropped_rows
from ..pages.data import altered, contradictions, copies, pieces
from ..pages.images import sizes_in_words
from ..system.events import note
from .tables import has_color, show, table

_FEW_CLASSES = 8
_LEAST_RATIO, _MOST_RATIO = 0.95, 1.4  # of good answers to bad ones, weights included; KTO's paper has 1 to 4/3


def say_report(prepared):
    """Print what the model will see, in four lines or so."""
    report = prepared.report
    tokens, length = report["tokens"], report["length"]
    for source in report["sources"]:
        weight = f", weight {source['weight']:g}" if source["weight"] != 1 else ""
        if 0 < source["tokens_an_epoch"] < tokens["total"]:
            counts = "images" if "image_sizes" in report else "tokens"
            weight += f", {source['tokens_an_epoch'] / tokens['total']:.0%} of the {counts}"
        changed = [
            f", {source[key]:,} {word}"
            for key, word in (("rows_truncated", "TRUNCATED"), ("rows_split", "split"))
            if source.get(key)
        ]
        dropped = f", {dropped_rows(source)}" if source["rows_dropped"] else ""
        note(
            f"data      {source['path']}: {source['rows_read']:,} rows ({source['format']}){weight}{dropped}{''.join(changed)}"
        )
        for line in altered(source):
            note(f"          {line}")
    for key in report["ignored_nothing"]:
        note(f"          data.ignore_keys: {key}: no row has this key")
    for path in report["not_read"]:
        note(f"          {path} is not read as rows")
    trained = f"{tokens['trained'] / tokens['total']:.0%} trained; " if "trained" in tokens else ""
    lengths = f"length p50 {length['p50']}, p95 {length['p95']}, max {length['max']}"
    what = f"{tokens['total']:,} tokens, {trained}{lengths}"
    if "image_sizes" in report:
        what = f"images {sizes_in_words(report['image_sizes'])}"
    note(f"          {report['rows']:,} rows to train on, {report['eval_rows']:,} held out; {what}")
    if "preference" in report:
        _say_preference(report["preference"])
    if "judged" in report:
        _say_unpaired(report["judged"], prepared.recipe.objective)
    if "classes" in report:
        note(f"          {_copies(report)}")
        _say_classes(report)
    else:
        note(f"          {report['ends_with_stop_token']:.0%} of rows end with a stop token; {_copies(report)}")
    for line in contradictions(report):
        note(f"          {line}")
    batches = prepared.batches
    if isinstance(batches, data.Packs):
        note(
            f"packing   {report['rows']:,} rows into {len(batches):,} of up to {batches.longest:,} tokens, "
            f"{report['packing_efficiency']:.0%} full"
        )
    elif isinstance(batches, data.Batches):
        note(f"batches   {report['rows']:,} rows in {len(batches):,} micro-batches")
    note(f"{'input' if 'image_sizes' in report else 'template':<10}{prepared.template}")


def _copies(report):
    return "; ".join([*([] if report["duplicates"] else ["no duplicate rows"]), *copies(report)])


def _say_preference(found):
    chosen, rejected, longer = found["chosen_tokens"], found["rejected_tokens"], found["chosen_longer"]
    note(
        f"pairs     of {found['prompts']:,} prompts; chosen answers have {chosen:.0f} tokens in the mean, rejected ones "
        f"{rejected:.0f}; chosen is the longer one in {longer:.0%}"
    )


def _say_unpaired(found, section):
    """Say how many answers are good and bad; loudly where one kind outweighs the other: KTO then learns little of that one."""
    good, bad = found["desirable"], found["undesirable"]
    tokens = {"good": found["desirable_tokens"], "bad": found["undesirable_tokens"]}
    means = " and ".join(f"{mean:.0f} tokens of {kind} ones" for kind, mean in tokens.items() if mean is not None)
    note(f"answers   to {found['prompts']:,} prompts: {good:,} good, {bad:,} bad; in the mean {means}")
    weighed = section.desirable_weight * good, section.undesirable_weight * bad
    if all(weighed) and not _LEAST_RATIO <= weighed[0] / weighed[1] <= _MOST_RATIO:
        more, field = ("GOOD", "undesirable_weight") if weighed[0] > weighed[1] else ("BAD", "desirable_weight")
        balance = getattr(section, field) * max(weighed) / min(weighed)
        note(
            f"          {more} ANSWERS OUTWEIGH THE OTHERS: set kto.{field}={balance:.3g} to make up for their numbers"
        )


def _say_classes(report):
    """Say how many rows each class has: of a few classes all, of many the largest and the smallest."""
    classes = sorted(report["classes"], key=lambda one: -one["rows"])
    said = [f"'{one['label']}' {one['rows']:,} ({one['share']:.1%})" for one in classes]
    if len(said) > _FEW_CLASSES:
        said = [said[0], "...", said[-1]]
    note(
        f"classes   {len(classes):,}: {', '.join(said)}; always the largest would be right for {classes[0]['share']:.1%}"
    )
    empty = [one["label"] for one in classes if not one["rows"]]
    if empty:
        note(f"          NO TRAINING ROW is {', '.join(empty[:10])}: nothing is learned of it")


def show_classes(prepared):
    """Show how many rows each class has, in the order of their numbers, where the task has classes."""
    classes = prepared.report.get("classes")
    if classes:
        rows = [[one["label"], str(number), f"{one['rows']:,}", f"{one['share']:.1%}", f"{one['eval_rows']:,}"]
                for number, one in enumerate(classes)]  # fmt: skip
        table("classes", ["", "number", "rows", "share", "held out"], rows)


def show_lengths(prepared):
    """Draw how many rows have which length, up to the longest; of images, which are alike, nothing."""
    if not prepared.checkpoint.task.file.HAS_TOKENS:
        show(f"steps     {prepared.report['steps_per_epoch']:,} per epoch")
        return
    bars = prepared.report["length"]["histogram"]
    tallest = max(count for *_, count in bars)
    show(f"lengths   of {prepared.report['rows']:,} rows; max_length is {prepared.recipe.data.max_length:,}")
    for first, last, count in bars:
        show(f"  {first:>7,} - {last:<7,} {'#' * round(40 * count / tallest)} {count:,}")
    show(f"steps     {prepared.report['steps_per_epoch']:,} per epoch")


def show_row(prepared, number, with_ids=False):
    """Show a training row, counted from 1, as it is trained."""
    example = prepared.examples[number - 1]
    if prepared.checkpoint.task.file.HAS_CLASSES:
        marked = f"label {prepared.recipe.data.labels[example.label]}"
    else:
        marked = "trained tokens in green" if has_color() else "trained: [[...]]"
    if prepared.examples.are_unpaired:
        marked = f"{'a good' if example.good else 'a BAD'} answer; {marked}"
    show(f"\nrow {number} ({prepared.examples.where(number - 1)}); {marked}")
    if not prepared.checkpoint.task.file.HAS_TOKENS:
        show("{} x {} pixels; --html FILE shows images".format(*example.size))
        return
    if prepared.examples.are_pairs:
        for name in (preference.CHOSEN, preference.REJECTED):
            show(f"{name}:")
            show(_rendered(pieces(prepared.tokenizer, getattr(example, name), with_ids), with_ids))
        return
    show(_rendered(pieces(prepared.tokenizer, example, with_ids), with_ids))


def _rendered(pieces, with_ids):
    """Return the row as it is trained, special tokens visible, trained tokens marked."""
    text, plain, inside = Text(), not has_color(), False
    for piece, ids, trained, special in pieces:
        if plain and trained != inside:
            text.append("[[" if trained else "]]")
        inside = trained
        style = ("bold " if special else "") + ("green" if trained else "magenta" if special else "dim")
        text.append(f"{piece!r}:{ids[0]} " if with_ids else piece, style=style)
    return text.append("]]") if plain and inside else text
