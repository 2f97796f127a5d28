"""Which split a data file or folder is by its name: train-00000-of-00002.parquet and my_train.csv are of train."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from ..system.errors import InputError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
WORDS = {
    "train": TRAIN,
    "training": TRAIN,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "val": VALIDATION,
    "dev": VALIDATION,
    "eval": VALIDATION,
    "test": TEST,
    "testing": TEST,
}


def divided(paths) -> dict[str, list[str]]:
    """Return {split: its files} where the names of `paths` tell training rows from others; {} where they do not."""
    found: dict[str, list[str]] = {}
    for path in paths:
        words = re.findall(r"[a-z]+", Path(path).stem.lower())
        if split := next((WORDS[word] for word in words if word in WORDS), None):
            found.setdefault(split, []).append(path)
    return found if TRAIN in found and len(found) > 1 else {}


def refuse_mixed(folder, paths):
    """Raise InputError where `paths`, the data files of a folder, are of several splits: they would be read as one."""
    splits = divided(paths)
    if splits:
        held_out = splits.get(VALIDATION) or splits[TEST]
        named = ", ".join(Path(path).name for path in paths[:4]) + (", ..." if len(paths) > 4 else "")
        raise InputError(
            f"the folder {folder} has the files of several splits ({named}), and training rows must not be held-out rows; give "
            f"each by itself, such as data.train={as_source(splits[TRAIN])} data.eval={as_source(held_out)}; "
            f"or all as one: {Path(folder) / '*'}"
        )


def as_source(paths):
    """Return what names exactly these files of one folder in a recipe: a path, a glob, or a list of paths."""
    first = Path(paths[0])
    if len(paths) == 1:
        return str(first)
    stem = re.match(r"[^\d]*", first.name)[0].rstrip("-_.")  # type: ignore[index]  # matches "" too
    pattern = str(first.parent / f"{stem}*{first.suffix}")
    return pattern if sorted(glob.glob(pattern)) == sorted(paths) else [str(path) for path in paths]  # noqa: PTH207
