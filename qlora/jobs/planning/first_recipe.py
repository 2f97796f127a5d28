"""A recipe for a model, a data file, a card and a goal: chosen by planning, each line with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ... import base_model, planner
from ...data import image_files
from ...recipe import Recipe, parse_size, reading
from ...recipe.commented import Line, overridden, values_of
from ...recipe.tasks import has_classes
from ...system import cards
from ...system.errors import DoesNotFit, InputError
from ...system.units import size
from ..opening.chosen_task import task_of
from ..opening.prepared_data import Prepared, prepare, refuse_pointless, with_method_of
from .data_looked_at import Divided, Looked, divide, look
from .goals import GOALS
from .plan_job import Budget, budget_of, computer_of, is_cpu, job_of, not_supported

_NF4 = Line("quantization.quant_type", "nf4", "4-bit base: a quarter of the memory of 16 bit")
_SIXTEEN = Line("quantization", None, "not quantized: it fits, and no weight is rounded to 4 bit")
_FAST = Line("quantization", None, "not quantized: faster than 4-bit weights, which are dequantized at each use")
# the best first: (base, rank, the reason for the rank)
_CANDIDATES = {
    "quality": [(_SIXTEEN, 32, "room to learn"), (_NF4, 32, "room to learn"), (_NF4, 16, "32 does not fit")],
    "speed": [(_FAST, 16, "the usual rank"), (_NF4, 16, "the usual rank")],
    "long": [(_NF4, 16, "the usual rank; the memory goes to the rows")],
    "small": [(_NF4, 4, "a quarter of the usual 16")],
}
_LONGEST = 2**17  # where a model sets no limit
_SMALL = 1024  # hidden width of the models of about 0.6B and less
_MAY_DROP = 0.05  # share of the rows that may be too long for the card
_RANK_FLOOR = (8, "more does not fit")


@dataclass(frozen=True)
class Machine:
    """What is planned for: kind "cuda" or "cpu", its planner's Budget, and the base_model.Computer."""

    kind: str
    budget: Budget
    on: Any


@dataclass(frozen=True)
class Chosen:
    """The lines of the recipe, the same as a Recipe, its Prepared data, and its planner.Plan."""

    lines: list[Line]
    recipe: Recipe
    prepared: Prepared
    plan: planner.Plan


def machine_of(card) -> Machine:
    """Return what `card` means: a card of `qlora plan --card list`, memory such as 12GiB, "cpu", or None: this machine's GPU."""
    plain = Recipe.from_dict({"model": {"name_or_path": "x"}, "data": {"train": "x"}, "output_dir": "x"})
    if is_cpu(card):
        return Machine("cpu", budget_of(plain, card=card), computer_of(card))
    try:
        return Machine("cuda", Budget(parse_size(str(card)), "as given"), computer_of(None))
    except ValueError:
        return Machine("cuda", budget_of(plain, card=card), computer_of(card))


def choose(model, data_file, machine: Machine, goal, overrides=()) -> Chosen:
    """Return the first recipe of `goal` whose plan fits; for "speed" the fastest of those.

    overrides: `section.field=value` that the recipe keeps, whatever would be chosen.

    Raises:
        InputError: model, data, goal or an override is wrong; or training on these rows is pointless.
        DoesNotFit: no candidate fits; says what would.
    """
    if goal not in GOALS:
        raise InputError(f"--goal {goal!r}: should be one of {', '.join(GOALS)}")
    given = reading.with_overrides("the recipe", {}, {}, list(overrides))[0]
    if given.get("task") == "image-classification" or image_files.are_images(data_file):
        raise InputError(
            f"{data_file}: init chooses for text; for images begin with:  qlora recipes copy vit-base/folders"
        )
    divided = divide(data_file)
    if (given.get("data") or {}).get("eval_fraction"):  # instead of the folder's own held-out rows
        divided = Divided(divided.train)
    looked = _looked(divided.train, given)
    start = _start(model, divided, looked, _new_folder(data_file))
    limit = _limit(values_of(start), overrides)
    rough = [Line("data.max_length", limit), Line("data.overlong", "drop"), *_candidate(*_CANDIDATES[goal][0])]
    prepared = prepare(_recipe([*start, *rough], overrides), weights=False, on=machine.on)
    refuse_pointless(prepared.report)
    common = [*_said_of_rows(start, prepared, looked), *_training(prepared, looked.task)]
    fitting, planned = [], []
    candidates = list(_CANDIDATES[goal])
    if goal != "small":
        candidates.append((_NF4, *_RANK_FLOOR))
    for candidate in candidates:
        lines = [*common, *_candidate(*candidate)]
        found, job = _fitted(lines, prepared, machine, goal, limit, overrides)
        planned.append(job)
        if found is not None:
            fitting.append(found)
            if goal != "speed":
                break
    if not fitting:
        raise DoesNotFit(_what_would(min(planned, key=lambda job: planner.plan(job).peak_bytes)))
    return max(fitting, key=lambda one: one.plan.tokens_per_second or 0)


def _looked(data_file, given):
    """Return what the rows are for; what the user says of task and columns counts."""
    task, columns = given.get("task"), (given.get("data") or {}).get("columns")
    if given.keys() & {*Recipe.names_of_objectives()}:
        return Looked("text-generation", None, "as given")
    if task and columns:
        return Looked(task, None, "as given")
    try:
        found = look(data_file)
    except InputError:
        if not columns:
            raise
        found = Looked("text-generation", None, "columns as given")
    if columns and "label" in columns:
        found = Looked("text-classification", None, "columns as given")
    columns = None if columns or (task and task != found.task) else found.columns
    return Looked(task or found.task, columns, found.why, found.objective)


def _start(model, divided: Divided, looked, output_dir):
    lines = [Line("task", looked.task, looked.why)] if has_classes(looked.task) else []
    lines += [Line(looked.objective, {}, looked.why)] if looked.objective is not None else []
    lines += [Line("model.name_or_path", str(model)), Line("data.train", divided.train)]
    if divided.held_out is not None:
        left = f"; not read: {', '.join(Path(path).name for path in divided.left)}" if divided.left else ""
        lines.append(Line("data.eval", divided.held_out, f"held out, as the folder has them{left}"))
    if looked.columns:
        lines.append(Line("data.columns", looked.columns, "what the columns of the file are"))
    return [*lines, Line("output_dir", output_dir, "the run goes here: a new folder")]


def _new_folder(data_file):
    stem = Path(str(data_file)).stem.strip("*?[]. ") or "mine"
    names = [f"runs/{stem}", *(f"runs/{stem}-{number}" for number in range(2, 1000))]
    return next((name for name in names if not Path(name).exists()), names[0])


def _limit(values, overrides):
    """Return the longest row that the model can take, in tokens."""
    recipe = Recipe.from_dict(values, overrides)
    checkpoint = base_model.find(recipe.model, weights=False, task=task_of(recipe))
    config = base_model.load_config(checkpoint, recipe.model)
    return min(base_model.num_positions(config) or _LONGEST, _LONGEST)


def _recipe(lines, overrides):
    return Recipe.from_dict(values_of(lines), overrides)


def _candidate(base, rank, why):
    return [base, Line("lora.r", rank, why), Line("lora.lora_alpha", 2 * rank, "twice r, as usual")]


def _said_of_rows(start, prepared, looked):
    """Return the lines of `start` with what is known of model and rows."""
    report, config = prepared.report, prepared.config.get_text_config()
    length = report["length"]
    formats = ", ".join(dict.fromkeys(source["format"] for source in report["sources"]))
    rows = f"{report['rows']:,} row{'s' * (report['rows'] > 1)} ({formats}); tokens: p50 {length['p50']}, max {length['max']:,}"
    layers = getattr(config, "num_hidden_layers", None)
    why = {
        "model.name_or_path": f"{config.model_type}, {layers} layers" if layers else config.model_type,
        "data.train": rows,
    }
    if has_classes(looked.task):
        some = ", ".join(f"{one['label']} ({one['rows']:,})" for one in report["classes"][:4])
        more = len(report["classes"]) - 4
        why["task"] = f"{len(report['classes'])} classes: {some}" + (f" and {more} more" if more > 0 else "")
    return [Line(line.field, line.value, why.get(line.field, line.why)) for line in start]


def _training(prepared, task):
    """Return the lines on epochs, steps and held-out rows, which the number of rows decides."""
    rows, lines = len(prepared.examples), []
    distinct = len(np.unique(prepared.examples.keys))
    held = 0.1 if rows < 1000 else 0.05 if rows < 5000 else 0.02
    if prepared.recipe.data.eval is not None:
        held = 0
    elif distinct == 1:
        held = 0
        lines.append(Line("data.eval_fraction", 0, "nothing is held out: there is one row, or all are alike"))
    else:
        count = max(1, round(held * distinct))
        why = f"{count:,} row{'s' * (count > 1)} held out: the loss on what is not trained on"
        lines.append(Line("data.eval_fraction", held, why))
    epochs = 3 if rows < 2000 else 2 if rows < 10_000 else 1
    lines.append(Line("training.num_train_epochs", epochs, f"each row is seen {epochs} time{'s' * (epochs > 1)}"))
    batch = 16
    while batch > 4 and rows * (1 - held) / batch < 25:
        batch //= 2
    if has_classes(task):
        lines.append(Line("training.per_device_train_batch_size", batch, "rows a step"))
        lines += _of_classes(prepared.report["classes"])
    else:
        lines.append(Line("training.gradient_accumulation_steps", batch, "rows a step; short ones are joined"))
    lines.append(_rate(prepared.config.get_text_config(), prepared.recipe.objective))
    steps = max(1, round(rows * (1 - held) / batch) * epochs)
    if held or prepared.recipe.data.eval is not None:
        every = max(1, steps // 5)
        looks = f"{steps // every} look{'s' * (steps > 1)} at held-out rows"
        lines.append(Line("training.eval_steps", every, f"of about {steps:,} step{'s' * (steps > 1)}: {looks}"))
    return lines


def _rate(config, objective=None):
    """Return the line on the learning rate, of an objective its own; docs/comparison.md has what small models do with it."""
    if objective is not None:
        why = f"{objective.key}'s usual start; compare others with qlora compare"
        return Line("training.learning_rate", objective.learning_rate, why)
    if getattr(config, "hidden_size", _SMALL + 1) <= _SMALL:
        return Line(
            "training.learning_rate", 5e-4, "a small model: 2e-4, the usual start, is slow; compare with qlora compare"
        )
    return Line("training.learning_rate", 2e-4, "LoRA's usual start; compare others with qlora compare")


def _of_classes(classes):
    counts = [one["rows"] for one in classes if one["rows"]]
    if min(counts) * len(counts) >= 0.3 * sum(counts):
        return []
    return [Line("data.class_weights", "balanced", f"the rarest class has {min(counts):,} of {sum(counts):,} rows")]


def _fitted(lines, prepared, machine, goal, limit, overrides):
    """Return (Chosen or None, the Job that was planned first) of a candidate."""
    longest = int(max(some.lengths.max() for some in (prepared.examples, prepared.eval_examples) if len(some)))
    what = "pair, both its answers counted," if "preference" in prepared.report else "row"
    said = f"the longest {what} has {longest:,} tokens"
    too_long = sum(source["rows_dropped"] for source in prepared.report["sources"])
    length = min(limit, max(8, -(-longest // 64) * 64))
    whole = [Line("data.max_length", length, said)]
    if too_long:
        whole = _dropping(length, too_long, prepared, "longer than the model's positions, or malformed")
    job = _job(prepared, _recipe([*lines, *whole], overrides), machine)
    fits = planner.plan(job).fits
    if not fits or goal == "long":
        most = planner.backwards(job).get("max_length", 0) // 64 * 64
        over = float(np.mean(prepared.examples.lengths > most))
        if not fits and (most < 8 or over > _MAY_DROP):
            return None, job
        if fits:
            most = min(limit, most)
            whole = [Line("data.max_length", most, f"as long as fits; {said}")]
        else:
            many = int((prepared.examples.lengths > most).sum()) + too_long
            whole = _dropping(most, many, prepared, "longer than fits")
    lines = [*lines, *whole]
    recipe = _recipe(lines, overrides)
    final = prepare(recipe, weights=False, on=machine.on)
    found = planner.plan(job_of(final, machine.kind, machine.budget))
    return (Chosen(overridden(lines, overrides), recipe, final, found) if found.fits else None), job


def _dropping(length, many, prepared, why):
    over = "truncate" if prepared.checkpoint.task.file.HAS_CLASSES else "drop"
    return [
        Line("data.max_length", length, "the most that fits"),
        Line("data.overlong", over, f"{many:,} row{'s are' if many > 1 else ' is'} {why}; they are counted"),
    ]


def _job(prepared, recipe, machine):
    try:
        return job_of(with_method_of(prepared, recipe, machine.on), machine.kind, machine.budget)
    except planner.NoPlan as error:
        so = ", so no recipe can be chosen for it; start from one of `qlora recipes`"
        raise not_supported(recipe, error, so) from None


def _what_would(job):
    """Return in words why `job` does not fit, and what would."""
    found, changes = planner.plan(job), [one for one in planner.suggestions(job) if one["fits"]]
    lines = [
        f"no recipe fits: the smallest needs {size(found.peak_bytes)} ({found.where}), {size(job.budget_bytes)} are there; "
        "what would:"
    ]
    lines += [f"  {change['set']}: {size(change['peak_bytes'])}" for change in changes]
    larger = sorted(cards.CARDS, key=lambda card: card.memory)
    card = next((card for card in larger if planner.plan(job.but(budget_bytes=card.memory)).fits), None)
    lines += [f"  a card such as {card.name} ({size(card.memory)}): --card '{card.name}'"] if card else []
    return "\n".join([*lines, "  a smaller model"])
