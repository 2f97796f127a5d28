"""Scores of classes as a person sees them: class by class, and which are taken for which."""

from __future__ import annotations

from ..evaluation.intervals import in_words
from .tables import show, table

_MOST_IN_A_MATRIX = 12
_MISTAKES = 10  # of the pairs that are listed where a matrix would be too wide


def show_classes(result):
    """Show what `evaluate` returns of classes beside the scores: the majority, each class, and what is taken for what."""
    if "majority" in result:
        most = result["majority"]
        show(f"always {most['label']!r} (no class has more training rows): accuracy {in_words(most['accuracy'])}")
    each = [[one["label"], f"{one['rows']:,}", *(f"{one[name]:.1%}" for name in ("precision", "recall", "f1"))]
            for one in result["per_class"]]  # fmt: skip
    table("classes", ["", "rows", "precision", "recall", "F1"], each)
    _show_mistakes(result["labels"], result["confusion"])


def _show_mistakes(labels, confusion):
    if len(labels) <= _MOST_IN_A_MATRIX:
        rows = [[label, *map(str, line)] for label, line in zip(labels, confusion, strict=True)]
        table("right class (line) and answer (column)", ["", *labels], rows)
        return
    pairs = [
        (count, labels[right], labels[answer])
        for right, line in enumerate(confusion)
        for answer, count in enumerate(line)
        if count and right != answer
    ]
    most = sorted(pairs, key=lambda pair: -pair[0])[:_MISTAKES]
    table(
        "most frequent mistakes", ["right class, answer", "rows"], [[f"{a}, {b}", str(count)] for count, a, b in most]
    )
