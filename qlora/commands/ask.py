"""What qlora init asks on a terminal. Imports nothing heavy: what is missing without one is said at once."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from ..jobs.planning.goals import GOALS
from ..system.errors import InputError


def ask(model=None, data=None, card=None, goal=None):
    """Return (model, data, card, goal), asking on the terminal for what is None.

    Raises:
        InputError: there is no terminal; names the flags.
    """
    if not sys.stdin.isatty():
        flags = [("--model", model), ("--data", data), ("--card", card)]
        missing = [flag for flag, given in flags if given is None]
        # --card is the last: of a command that lacks nothing else torch is asked, which takes seconds to import
        if missing and (missing != ["--card"] or not _has_gpu()):
            raise InputError(
                f"qlora init: {', '.join(missing)} missing, and there is no terminal to ask on; as in qlora init --model FOLDER "
                "--data rows.jsonl --card 4090 --goal quality"
            )
        return model, data, card, goal or "quality"
    model = model or _path("model: a folder, or OWNER/NAME on the hub")
    data = data or _path("data: a file of rows (JSONL, JSON, CSV, Parquet)")
    if card is None and not _has_gpu():
        card = _answer(
            "card: no GPU was found here; the one that will train, such as 3060 or T4, its memory such as 12GiB, or cpu",
            "4090",
        )
    for name, what in GOALS.items() if goal is None else ():
        typer.echo(f"  {name:<8} {what}", err=True)
    return model, data, card, goal or _answer(f"goal: {', '.join(GOALS)}", "quality")


def _has_gpu():
    import torch

    return torch.cuda.is_available()


def _path(question):
    """Return the answer, a path or a name, with ~/ as the shell would have it, which has not seen it."""
    said = _answer(question)
    return str(Path(said).expanduser()) if said.startswith("~/") else said


def _answer(question, default=None):
    return str(typer.prompt(question, default=default, err=True)).strip()
