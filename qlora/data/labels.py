"""Classes: what the label of a row says, which classes the training rows have, and how many rows each has."""

from __future__ import annotations

import collections
import json
import math
import re
import unicodedata
from decimal import Decimal

import numpy as np

from ..system.errors import InputError
from . import columns, sources

COLUMN = "label"
BY_PLACE = "rows_by_place"  # of a file's summary: rows that say a number for a name, see number_of
_NUMBER = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?")  # 01 is a code
_NO_NAME = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's kinds of control characters, half characters and line ends
_FEW = 100  # distinct labels above which they may be no classes


def said(value):
    """Return the name of the class that a row's label, as it stands in a file, says; a number's is its digits.

    Raises:
        ValueError: it says none, or several.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    ):
        raise ValueError("label is empty: the row has no class")
    if isinstance(value, (list, tuple, dict)):
        raise ValueError(f"label is {json.dumps(value, default=str)[:80]}: a row has one class, a name or a number")
    if isinstance(value, bytes):
        raise ValueError(f"label is {value!r:.80}, bytes: a class is a name or a number")
    if isinstance(value, float):
        raise ValueError(f"label is {value}, a fraction, not a class; round it, or name ranges")
    name = str(value)
    if wrong := next((letter for letter in name if unicodedata.category(letter) in _NO_NAME), None):
        raise ValueError(
            f"label is {name!r:.80}, with the character U+{ord(wrong):04X}: a class is a name of one line; is a quote or a comma "
            "of the file wrong?"
        )
    if name.startswith("-") and name[1:].isdecimal() and name.strip("-0"):
        raise ValueError(
            f"label is {name:.80}, which marks rows without a class, as in the test sets of GLUE; leave them out, or, if it is a "
            'class, make it a name: data.columns={label: "class {{ label }}"}'
        )
    return name


def number_of(name, labels):
    """Return the number of a class; digits stand for a name by its place, where the names themselves are no numbers.

    Raises:
        ValueError: there is no such class.
    """
    if name in labels:
        return labels.index(name)
    if name.isdecimal() and Decimal(name) < len(labels) and not any(label.isdecimal() for label in labels):
        return int(name)
    known = ", ".join(labels[:10]) + (f" and {len(labels) - 10:,} more" if len(labels) > 10 else "")
    raise ValueError(f"label {name!r:.80} is not one of the classes of the training: {known}")


def found(source_list, section, open_source=sources.open_source):
    """Return the names of the classes that the training rows have, in order: numbers by size, names by the alphabet.

    source_list: of the recipe's data.train; section: its data; open_source: the encoder's. A data set of the hub that names its
    classes decides itself. Rows that say no class are passed over: they are refused with their lines when they are tokenized.

    Raises:
        InputError: there is one class only, or what is there are no classes.
    """
    counts: collections.Counter = collections.Counter()
    for source in source_list:
        columns_of = source.columns or section.columns or {}
        mapped = {COLUMN: columns_of.get(COLUMN, COLUMN)}
        for file in open_source(source, columns_of):
            names = file.names_of(mapped[COLUMN])
            if names:
                return list(names)
            counts.update(_labels_in(file, mapped))
    where = ", ".join(str(source.path or source.name) for source in source_list)
    if not counts:
        raise InputError(f"{where}: no row has a label; {_remedy(source_list, section)}")
    return _in_order(counts, where)


def _remedy(source_list, section):
    """Return in words which columns there are, and where the recipe names that of the label."""
    [first, *_] = sources.open_source(source_list[0])
    value = next(first.rows()).value
    there = f"the first row has {', '.join(map(str, value))}; " if isinstance(value, dict) else ""
    column = (source_list[0].columns or section.columns or {}).get(COLUMN, COLUMN)
    return f"{there}it is looked for in {column!r}, and data.columns={{label: NAME}} names another column"


def _labels_in(file, mapped):
    for row in file.rows():
        try:
            yield said(columns.renamed(row.value, mapped)[COLUMN])
        except ValueError:
            continue


def _in_order(counts, where):
    names = list(counts)
    if len(names) > _FEW and len(names) > sum(counts.values()) / 2:
        raise InputError(
            f"{where}: {len(names):,} different labels in {sum(counts.values()):,} rows, so these are not classes; is "
            "data.columns.label right?"
        )
    refuse_one(names, where)
    refuse_alike(names, where)
    return sorted(names, key=Decimal) if all(name.isdecimal() for name in names) else sorted(names)


def refuse_one(names, where):
    """Raise InputError if there are not two classes to tell apart."""
    if len(names) < 2:
        raise InputError(f"{where}: every row has the label {names[0]!r}; there is nothing to tell apart")


def refuse_alike(names, where):
    """Raise InputError if two classes are the same word but for capitals, spaces and what is not seen, or the same number."""
    same = collections.defaultdict(list)
    for name in sorted(names):
        seen = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
        word = unicodedata.normalize("NFC", " ".join(seen.split()).casefold())
        same[Decimal(word) if _NUMBER.fullmatch(word) else word].append(name)
    why = {str: "differ in capitals, spaces or how a character is written only", Decimal: "are one number"}
    twice = [f"labels {_told_apart(names)} {why[type(key)]}" for key, names in same.items() if len(names) > 1]
    if twice:
        raise InputError.listing(where, twice, "write them alike, or list all classes in data.labels")


def _told_apart(names):
    """Return names in words; by the numbers of their characters where they look the same."""
    look_alike = len({unicodedata.normalize("NFC", name) for name in names}) < len(names)
    return ", ".join(map(ascii if look_alike else repr, names))


def balance(rows, held_out, labels):
    """Return [{"label", "rows", "share", "eval_rows"}] for each class, and under "contradictory" how many training rows say
    the same as another with another label."""
    numbers, ours = rows.numbers(COLUMN), held_out.numbers(COLUMN)
    counts, evals = (np.bincount(one, minlength=len(labels)).tolist() for one in (numbers, ours))
    pairs = np.unique(np.stack([rows.keys, numbers.astype(np.uint64)]), axis=1)
    texts, labels_of_text = np.unique(pairs[0], return_counts=True)
    once = rows.one_each()  # not those that a source's weight repeats
    return {
        "classes": [
            {"label": label, "rows": count, "share": count / max(1, len(numbers)), "eval_rows": held}
            for label, count, held in zip(labels, counts, evals, strict=True)
        ],
        "contradictory": int(np.isin(once.keys, texts[labels_of_text > 1]).sum()),
    }


def weights(setting, counts, labels):
    """Return the weight of each class in the loss, None where all count alike.

    setting: the recipe's data.class_weights. counts: training rows of each class. balanced: rows / (classes * rows of the
    class), so that each class counts as much as any other, and a row 1 in the mean.

    Raises:
        InputError: a class that is named does not exist, or one has no rows to be balanced.
    """
    if setting is None:
        return None
    if setting == "balanced":
        empty = [label for label, count in zip(labels, counts, strict=True) if not count]
        if empty:
            raise InputError(
                f"data.class_weights balanced: no training row is {', '.join(empty)}; give weights by name"
            )
        return tuple(sum(counts) / (len(counts) * count) for count in counts)
    unknown = sorted(set(setting) - set(labels))
    if unknown:
        raise InputError(f"data.class_weights: {', '.join(unknown)} is none of the classes {', '.join(labels)}")
    return tuple(float(setting.get(label, 1.0)) for label in labels)
