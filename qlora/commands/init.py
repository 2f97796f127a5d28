"""qlora init: a short recipe that fits, from four answers; or from the file of another tool."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from ..jobs.planning.first_recipe import choose, machine_of
from ..jobs.planning.goals import GOALS
from ..recipe import Recipe, commented, migration
from ..system.errors import InputError
from ..system.events import note, notes_once
from ..system.storage import write_text
from ..system.units import duration, size
from ..terminal import shown
from ..terminal.data import say_report
from ..terminal.plan import why_no_time
from ..terminal.tables import show


@shown()
def init(model, data, card=None, goal="quality", out="recipe.yaml", overrides=()) -> dict:
    """Write a short recipe that fits to `out`, each line with its reason; return {"recipe", "values", "plan"}.

    model: a folder or a name on the hub. data: a file, glob or folder of rows, which are read. card: a card such as 4090, memory
    such as 12GiB, or cpu; None: the GPU of this machine. goal: quality, speed, long (rows) or small (adapter). overrides:
    `section.field=value` that the recipe keeps. No weights are read, and nothing is overwritten.

    Raises:
        InputError: an argument, the model or the data is wrong, or `out` exists.
        DoesNotFit: nothing fits; says what would.
    """
    _refuse_existing(out)
    machine = machine_of(card)
    with notes_once():
        chosen = choose(model, data, machine, goal, overrides)
    say_report(chosen.prepared)
    found = chosen.plan
    time = "" if found.hours is None else f", at least {duration(3600 * found.hours)}"
    steps = "" if found.steps is None else f"; {found.steps:,} steps{time}"
    planned = f"planned: {size(found.peak_bytes)} of {size(found.budget_bytes)} ({machine.budget.why}){steps}"
    named, run = shlex.quote(str(out)), chosen.recipe.output_dir
    header = [f"goal {goal}: {GOALS[goal]}", planned]
    if found.hours is None and (why_none := why_no_time(machine.kind, machine.budget.card)):
        header.append(f"time: {why_none}")
    if machine.kind == "cpu":
        header.append(f"plan it again: qlora plan {named} --card cpu")
    header.append(f"train it: qlora train {named}")
    _write(out, header, chosen.lines)
    run, page = shlex.quote(run), shlex.quote(f"{Path(run).name}-report.html")  # with a twin in JSON: not the rows
    note(f"then      whether it worked: qlora eval {run}; qlora report {run} --out {page}")
    return {"recipe": str(out), "values": chosen.recipe.model_dump(), "plan": dataclasses.asdict(found)}


@shown()
def migrate(file, out="recipe.yaml", overrides=()) -> dict:
    """Write the recipe that says what an axolotl or LLaMA-Factory file says; return what became of each of its fields.

    {"recipe", "tool", "carried": {their field: ours}, "not_needed", "no_counterpart": {their field: why}, "defaults": {our field:
    why}, "unset": [their fields]}. The last lines of the recipe name what it does not carry over.

    Raises:
        InputError: the file is of neither tool, trains something else than answers, or `out` exists.
    """
    _refuse_existing(out)
    found = migration.read(file)
    lines = commented.overridden(found.lines, overrides)
    Recipe.from_dict(commented.values_of(lines))
    named = shlex.quote(str(out))
    header = [f"made of {file}, a file of {found.tool}", f"look at it: qlora data {named}; qlora plan {named}"]
    _write(out, header, lines, found.footer())
    if found.no_counterpart:
        note(f"          no counterpart: {', '.join(found.no_counterpart)}; the last lines of the recipe say more")
    return {"recipe": str(out), "tool": found.tool, "carried": found.carried, "not_needed": found.not_needed,
            "no_counterpart": found.no_counterpart, "defaults": found.defaults, "unset": found.unset}  # fmt: skip


def _refuse_existing(out):
    path = Path(out)
    if path.exists() or path.is_symlink():
        raise InputError(f"{out} exists; qlora init never overwrites: choose another name with --out")


def _write(out, header, lines, footer=()):
    """Write the recipe, show it, and say what to type next."""
    text = commented.as_text(header, lines, footer)
    show("")
    for line in text.splitlines():
        show(line)
    show("")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    _refuse_existing(out)  # planning takes a while
    write_text(out, text)
    note(f"recipe    {out}")
    note(f"next      qlora train {shlex.quote(str(out))}")
