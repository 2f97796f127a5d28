"""What train --resume checks: is there a run to resume, from which checkpoint, and have its settings changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import base_model, data, methods
from ...recipe import Recipe
from ...runs import record
from ...runs.checkpoints import Checkpoints, read_state
from ...runs.folder import RunDir
from ...system.errors import InputError
from ...system.events import note
from ...system.storage import sha256
from . import started_from

_LENGTH = ("training.max_steps", "training.num_train_epochs")
# what changes no weight, and what is compared by its content instead of its place
_FREE = {
    *(
        "output_dir",
        "memory",
        "export",
        "model.name_or_path",
        "model.revision",
        "model.adapter_name_or_path",
        "data.chat_template",
        "data.num_proc",
    ),
    *(
        f"training.{name}"
        for name in (
            "logging_steps",
            "report_to",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "watchdog_steps",
            "num_samples",
            "early_stopping_patience",
            "load_best_model_at_end",
            "metric_for_best_model",
        )
    ),
    "training.per_device_eval_batch_size",
}
_DTYPE, _TASK, _TOKENS = "model.dtype", "task", "tokens"
_WHY = {_TOKENS: "; the rows are the same and read otherwise: does the chat template write the date?"}
_PLACE = {"path", "name", "subset", "split", "revision"}


def of_recipe(recipe: Recipe, prepared) -> dict:
    """Return {field: value} of all that must not change when a run is resumed, from recipe, data and tokenizer."""
    found: dict[str, Any] = {}
    for name, section in recipe.model_dump().items():
        fields = {f"{name}.{key}": value for key, value in section.items()} if isinstance(section, dict) else {}
        found |= {} if name in _FREE else fields or {name: section}
    found = {name: value for name, value in found.items() if name not in _FREE}
    # where it has a meaning: runs of before there was this field have computed in bfloat16
    found.pop(_DTYPE)
    if recipe.quantization is None:
        found[_DTYPE] = recipe.model.dtype
    if found[_TASK] == Recipe.model_fields[_TASK].default:  # nor has a run of before there were others this one
        del found[_TASK]
    for name in ("data.train", "data.eval"):
        found[name] = [{k: v for k, v in source.items() if k not in _PLACE} for source in found[name] or []]
    tokenizer, rows = prepared.tokenizer, prepared.examples
    found["data"] = [part.digest for part in prepared.parts]
    taught = rows.numbers(data.labels.COLUMN) if prepared.checkpoint.task.file.HAS_CLASSES else rows.num_trained
    found["rows"] = _digest(rows.lengths.tobytes(), taught.tobytes(), rows.keys.tobytes())
    found[_TOKENS] = _digest(*(array for part in rows.parts for array in part.arrays))  # a template may write the date
    if prepared.checkpoint.task.file.HAS_TOKENS:
        special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
        found["tokenizer"] = _digest(tokenizer.backend_tokenizer.to_str().encode(), special.encode())
        found["chat_template"] = _digest(str(tokenizer.chat_template).encode())
    else:
        found["image_processor"] = base_model.image_processor.identity(tokenizer)
    start = started_from.folder_of(recipe.model)
    if start is not None:
        found["adapter"] = sha256(start / methods.WEIGHTS)
    return json.loads(json.dumps(found))


def of_base(file_hashes, quantized) -> dict:
    """Return the same for the base: its files, and the 4-bit weights made from them."""
    return {
        "base_model": _digest(json.dumps(file_hashes, sort_keys=True).encode()),
        "base_model.quantized": _digest(json.dumps(quantized, sort_keys=True).encode()),
    }


def _digest(*pieces):
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(hashlib.sha256(piece).digest())
    return whole.hexdigest()


@dataclass
class Resumed:
    """A run that is resumed. checkpoint: the folder to resume from; allowed: fields that may have changed; fixed_length: it
    cannot be made longer; what_for: in words."""

    run: RunDir
    kept: Checkpoints
    checkpoint: Path
    environment: dict
    allowed: tuple
    fixed_length: bool = False
    what_for: str = "resume"

    def __post_init__(self):
        self.state = read_state(self.checkpoint)

    def refuse_changes(self, now):
        """Raise InputError if fields of `now` differ from those the run started with, unless they are allowed to."""
        then = self.state["fingerprint"]
        if _DTYPE in now:
            then = {_DTYPE: "bfloat16"} | then
        if _TOKENS in now:  # of a run of before there was this field, they are taken to be the same
            then = {_TOKENS: now[_TOKENS]} | then
        changed = [name for name in sorted(now) if now[name] != then.get(name)]
        if "rows" in changed and _TOKENS in changed:  # other rows have other tokens
            changed.remove(_TOKENS)
        if any(name in now for name in _LENGTH):
            gone = then.keys() - now.keys() - {"base_model", "base_model.quantized"}
            changed += sorted(gone)
            if not self.fixed_length and _at_least_as_long(then, now):
                changed = [name for name in changed if name not in _LENGTH]
            unknown = sorted(set(self.allowed) - then.keys() - now.keys())
            if unknown:
                known = ", ".join(sorted(then.keys() | now.keys()))
                raise InputError(f"--allow-change {unknown[0]}: no such field; the fields are {known}")
        refused = [name for name in changed if name not in self.allowed]
        if refused:
            many = f"{len(refused)} settings" if len(refused) > 1 else "1 setting"
            lines = [
                f"{name}: was {_said(then.get(name))}, is {_said(now.get(name))}{_WHY.get(name, '')}"
                for name in refused
            ]
            allow = " ".join(f"--allow-change {name}" for name in refused)
            accept = f", or accept the change with {allow}" if self.what_for == "resume" else ""
            raise InputError(
                "\n  ".join(
                    [
                        f"cannot {self.what_for}: {many} changed since {self.checkpoint}",
                        *lines,
                        f"change it back{accept}",
                    ]
                )
            )

    @property
    def tokens_per_micro_batch(self):
        """The tokens of its joined micro-batches, at most; None where it has none."""
        return self.environment.get("tokens_per_micro_batch")

    def as_begun(self, recipe: Recipe) -> Recipe:
        """Return `recipe` with micro-batches of rows where the run has those and the recipe does not say: auto is newer."""
        training = recipe.training
        then = self.state["fingerprint"].get("training.tokens_per_micro_batch")
        if "tokens_per_micro_batch" in training.model_fields_set or then is not None:
            return recipe
        note("resumed   the run has training.tokens_per_micro_batch: null, and goes on with that")
        return recipe.model_copy(update={"training": training.model_copy(update={"tokens_per_micro_batch": None})})

    def begin(self, recipe: Recipe):
        """Write this recipe into the run folder and move a finished adapter/ and its scores aside."""
        run = self.run
        if run.adapter.is_dir():
            kept = _place_of_finished(run)
            run.adapter.rename(kept)
            for scores in (run.eval_file, run.answers_file, run.evals, *run.served_files):
                if scores.exists():
                    scores.rename(kept / scores.name)
        run.write_recipe(recipe)
        self.kept.rotate(self.checkpoint, recipe.training.save_total_limit)  # a killed process may not have come to it


@contextlib.contextmanager
def resumed(recipe: Recipe, allowed):
    """Yield the Resumed run in recipe.output_dir, locked while the block runs; None where it is finished.

    Raises:
        InputError: no run is there, another process has it, or none of its checkpoints verifies.
    """
    run = RunDir(recipe.output_dir)
    if not run.recipe_file.is_file():
        raise InputError(f"output_dir {run.path} contains no run to resume; leave --resume out to start one")
    with run.locked():
        if run.adapter.is_dir() and not _is_longer(run.recipe(), recipe):
            length = _LENGTH[0] if run.recipe().training.max_steps is not None else _LENGTH[1]
            note(
                f"{run.path} is finished: {_last_step(run):,} steps; set a higher {length}, which says how long it was to "
                "train, to train it further, or output_dir=ANOTHER_FOLDER to start anew"
            )
            yield None
            return
        if run.adapter.is_dir() and _place_of_finished(run).exists():
            raise InputError(f"{_place_of_finished(run)} already exists; move it, then resume")
        known = run.environment() if run.environment_file.exists() else {}
        kept = Checkpoints(run.checkpoints, known.get("id"))
        kept.remove_leftovers()
        path, skipped = kept.newest()
        for reason in skipped:
            note(f"skipped   {reason}")
        if path is None:
            raise InputError(
                f"output_dir {run.path} has no checkpoint to resume from"
                + (": none of them is complete" if skipped else "")
                + "; remove the folder to start again"
            )
        yield Resumed(run, kept, path, known, tuple(allowed), recipe.method.fixed_length)


def _at_least_as_long(then, now):
    (old_steps, old_epochs), (steps, epochs) = ([fields[name] for name in _LENGTH] for fields in (then, now))
    if old_steps is None or steps is None:
        return old_steps is steps and epochs >= old_epochs
    return steps >= old_steps


def _is_longer(old: Recipe, new: Recipe):
    then, now = ({name: getattr(recipe.training, name.partition(".")[2]) for name in _LENGTH} for recipe in (old, new))
    return _at_least_as_long(then, now) and not _at_least_as_long(now, then)


def _place_of_finished(run):
    """Return where what a finished run has trained is kept when the run is continued."""
    return run.path / f"{run.adapter.name}-step-{_last_step(run)}"


def _last_step(run):
    return max((line.step for line in record.read(run)), default=0)


def _said(value):
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}..."
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 100 else f"{text[:80]}..."
