"""The first rows of a data file, looked at: which task they are for, and which columns a recipe must name."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from ...data import formats, labels, preference, sources, splits
from ...recipe import Data, on_one_line
from ...system.errors import InputError

_ROWS = 300
_MOST_CLASSES = 100
# names that data sets have for what is asked and what is answered; others are the user's to say
_ASKED = "question query prompt input source src mr article document dialogue problem english".split()
_ANSWERED = (
    "answer response completion output target tgt ref reference human_reference summary highlights solution".split()
)
_LABEL = "label labels class category intent sentiment target coarse_label".split()
_TEXT = "text sentence review content comment utterance tweet title".split()
_PAIRS = (("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))


@dataclass(frozen=True)
class Looked:
    """task: of transformers' names. columns: data.columns, None where the rows have the known names. why: in words. objective:
    the recipe's section that takes such rows; None: supervised training."""

    task: str
    columns: dict | None
    why: str
    objective: str | None = None


@dataclass(frozen=True)
class Divided:
    """What data.train and data.eval are where somebody names a file, a glob or a folder. train, held_out: a path, a glob or a
    list of paths; held_out: None but of a folder with the files of several splits. left: its files that are neither."""

    train: str | list[str]
    held_out: str | list[str] | None = None
    left: tuple[str, ...] = ()


def divide(path) -> Divided:
    """Return what there is to train on at `path`; of a folder with train.jsonl, valid.jsonl and test.jsonl the first two."""
    files = sources.files_of(path) if Path(path).is_dir() else []
    found = splits.divided(files)
    if not found:
        return Divided(str(path))
    train, held_out = found[splits.TRAIN], found.get(splits.VALIDATION) or found[splits.TEST]
    left = tuple(path for path in files if path not in {*train, *held_out})
    return Divided(splits.as_source(train), splits.as_source(held_out), left)


def look(path) -> Looked:
    """Return what the first rows of the data at `path`, a file, glob, folder or list of files, are for.

    Rows that are none come back as text-generation, whose reading refuses them with their line.

    Raises:
        InputError: there is no such file, or nobody can tell which column is asked and which is answered.
    """
    source = Data.of_file(path[0] if isinstance(path, list) else path, {}).train[0]
    rows = itertools.chain.from_iterable(file.rows() for file in sources.open_source(source, None))
    seen = [row.value for row in itertools.islice(rows, _ROWS) if row.problem is None and isinstance(row.value, dict)]
    if seen and preference.is_pair(seen[0]):
        return Looked("text-generation", None, "rows are pairs: a good and a bad answer", "dpo")
    if not seen or any(key in seen[0] for key in formats.PREFERENCE):
        return Looked("text-generation", None, "")
    keys = [str(key) for key in seen[0]]
    known = next((name for name, one in formats.FORMATS.items() if set(one.KEYS) <= set(keys)), None)
    if known not in (None, "text") and formats.verdict(seen[0]) is not None:
        return Looked("text-generation", None, "rows have one answer, and say whether it is good", "kto")
    if known not in (None, "text"):
        return Looked("text-generation", None, f"rows of format {known}")
    return _classes(seen, keys) or _words(path, keys, known, seen)


def _classes(seen, keys):
    """Return Looked where the rows are texts with a class each, else None."""
    label = next((key for key in keys if key.lower() in _LABEL), None)
    lower = {key.lower(): key for key in keys}
    pair = next((pair for pair in _PAIRS if set(pair) <= lower.keys()), None)
    text = next((key for key in keys if key.lower() in _TEXT), None)
    if label is None or not (pair or text):
        return None
    try:
        classes = {labels.said(row.get(label)) for row in seen}
    except ValueError:
        return None
    if not 1 <= len(classes) <= min(_MOST_CLASSES, max(2, len(seen) // 2)):
        return None
    named = {"text": text} if pair is None else {"text": lower[pair[0]], "text_pair": lower[pair[1]]}
    named["label"] = label
    columns = None if all(name == column for name, column in named.items()) else named
    return Looked("text-classification", columns, f"{label!r} has {len(classes)} values in the first {len(seen)} rows")


def _words(path, keys, known, seen):
    """Return Looked of rows of words; raises InputError where their columns could mean anything."""
    asked, answered = (next((key for key in keys if key.lower() in names), None) for names in (_ASKED, _ANSWERED))
    if known == "text" and answered is None:
        return Looked("text-generation", None, "rows of format text")
    asked = "text" if known == "text" else asked
    if asked is None or answered is None:
        raise InputError(
            f"{path}: columns {', '.join(keys) or 'none'} match no known format; name them, as in\n  "
            + "\n  ".join(_readings(keys, seen))
        )
    return Looked("text-generation", {"prompt": asked, "completion": answered}, f"columns {', '.join(keys)}")


def _readings(keys, seen):
    """Yield what columns of any names may be, as data.columns: a text and its class, a question and its answer."""
    if len(keys) < 2:
        yield "data.columns='{prompt: COLUMN, completion: COLUMN}'"
        return
    long = sorted(keys, key=lambda key: -sum(len(str(row.get(key) or "")) for row in seen))
    values = {key: len({str(row.get(key)) for row in seen}) for key in long[1:]}
    few = [key for key, many in values.items() if 1 < many <= min(_MOST_CLASSES, len(seen) // 2)]
    other = min(few, key=lambda key: values[key]) if few else long[1]
    if few:
        yield f"data.columns='{_flow(text=long[0], label=other)}' for classes ({values[other]} in the first {len(seen)} rows)"
    asked, answered = sorted([long[0], other], key=keys.index)
    yield f"data.columns='{_flow(prompt=asked, completion=answered)}' for answers in words"


def _flow(**columns):
    written = (f"{name}: {_word(key)}" for name, key in columns.items())
    return f"{{{', '.join(written)}}}"


def _word(key):
    """Return a column's name as YAML between the quotes of a shell has it."""
    return key if key.isidentifier() and on_one_line(key) == key else json.dumps(key)
