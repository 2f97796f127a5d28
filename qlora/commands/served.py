"""qlora compare RUN --served: one finished run in each form that it can be served in, in one table."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import torch

from .. import base_model
from ..jobs.exporting.served_forms import FORMS, measure, open_job
from ..jobs.opening.opened_adapter import open_trained
from ..pages import served as page
from ..runs.environment import served_with
from ..runs.folder import RunDir
from ..system import launched
from ..system.devices import say_device
from ..system.errors import InputError, Interrupted
from ..system.events import Found, emit, note
from ..system.storage import locked, scratch_folder, write_json, write_text
from ..system.usual_torch import usual_torch
from ..terminal import shown
from ..terminal.tables import show, table

MAX_ROWS = 32


@shown()
@usual_torch()
def compare_served(run, data=None, max_rows=None, forms=()) -> dict:
    """Return {"run", "command", "date", "device", "threads", "versions", "rows", "tokens", "loss", "forms", "notes"} of a run.

    Each form is made in a folder inside the run, one at a time, measured and removed: "forms" has {"name", "what", "bytes",
    "loss", "kl", "tokens_per_second", "first_token_seconds", "message"} of each. Loss and kl are in nats a trained token of rows:
    the first `max_rows` (32) that the run has held out, or of the file `data`. kl: KL(trained, form), where the trained model
    computes in float32, and has "loss". A form that could not be made has a message that says why, and None for numbers.
    forms: names of `served_forms.FORMS`, by default all. Writes served.json, served.md and served.csv into the run.

    Raises:
        InputError: no finished run, an unknown form, no rows, too little disk, or another process has the run.
        Interrupted: by a signal; nothing is left.
    """
    command = _command(run, data, max_rows, forms)
    launched.refuse_several(command)
    names = _chosen(forms)
    opened = RunDir.open(run)
    say_device()
    try:
        with (
            locked(opened.lock_file, opened.path, "measure another run"),
            open_trained([str(run)]) as trained,
            scratch_folder(opened.path / "served") as scratch,
        ):
            job = open_job(opened, trained, data, max_rows or MAX_ROWS)
            rows = measure(job, names, scratch)
    except Interrupted as stopped:
        raise Interrupted(stopped.number, f"stopped; nothing was left in {opened.path}") from None
    found = {
        "run": str(run),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        **served_with(base_model.default_device()),
        "threads": torch.get_num_threads(),
        "rows": len(job.rows),
        "tokens": job.reference.num_tokens,
        "loss": job.reference.loss,
        "forms": rows,
    }
    found["notes"] = _notes(found)
    table(
        f"{run}, served: {found['tokens']:,} trained tokens of {found['rows']} rows", page.COLUMNS, page.table_of(found)
    )
    for line in [*page.remarks(found), *found["notes"]]:
        show(line)
    emit(Found(found))
    json_file, markdown_file, csv_file = opened.served_files
    write_text(markdown_file, page.as_markdown(found))
    write_text(csv_file, page.as_csv(found))
    write_json(json_file, found)
    note(f"table in {opened.path}: served.md, .csv, .json")
    return found


def _chosen(forms):
    unknown = [name for name in forms if name not in FORMS]
    if unknown:
        raise InputError(f"--form {unknown[0]}: is not one of {', '.join(FORMS)}")
    return [name for name in FORMS if not forms or name in forms]


def _command(run, data, max_rows, forms):
    words = ["qlora", "compare", str(run), "--served"]
    words += [] if data is None else ["--data", str(Path(data))]
    words += [] if max_rows is None else ["--max-rows", str(max_rows)]
    return shlex.join([*words, *(word for name in forms for word in ("--form", name))])


def _notes(found):
    elsewhere = "" if found["device"].startswith("cpu") else ", int8 on its CPU"
    measured = f"{found['tokens']:,} tokens of {found['rows']} rows"
    return [
        f"Loss and KL: nats a trained token, {measured}; KL to the trained model computed in float32, whose loss is "
        f"{found['loss']:.4f}. Each form computes as it is served.",
        "Size: of the weights; where they are quantized on loading, or base and adapter are two, what they take in memory.",
        f"Tokens/s: greedy, one answer at a time, on {found['device']} with {found['threads']} threads{elsewhere}; they mean "
        "little if the machine did something else meanwhile.",
    ]
