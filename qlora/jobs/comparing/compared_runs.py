"""The trainings of a comparison: which there are, what became of each, and what its run folder says of it.

    runs/compare/
      comparison.yaml    what is compared
      recipes/NAME.yaml  the recipe of each training, as `qlora train` gets it
      logs/NAME.txt      what training and evaluation printed
      NAME/              an ordinary run folder each
      failed/NAME.json   instead, or beside it: what became of a training that did not end well
      comparison.json, .csv, .md, .png

The folders are the state: whatever ends a comparison, what is there is read again, and the rest is trained. Training and
evaluation are processes of their own, the commands that anybody would type, so that what one of them does to memory is not in the
next one's numbers, and nothing ends them all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ... import data
from ...evaluation import answer_metrics, preferences, scores
from ...evaluation.asked import Asked
from ...evaluation.intervals import OF_LOSS, ratio
from ...recipe import Data, as_yaml, yaml_document
from ...recipe.comparison import FILE, NUMBERS, Comparison, Entry, entries
from ...runs import record
from ...runs.folder import RunDir, extract_of
from ...system import files
from ...system.errors import DoesNotFit, InputError, Interrupted, TrainingFailed
from ...system.events import note
from ...system.signals import ENDS_WITH_STDIN
from ...system.storage import refuse_nonempty, write_json, write_text
from ..evaluating import eval_rows
from ..opening.chosen_task import encoder_of

DONE, FAILED, UNFINISHED, TO_DO = "done", "failed", "unfinished", "to do"


def _says(file, recipe):
    """Return whether a file says what a recipe does, spelled in whatever way."""
    found, _ = yaml_document.parse(files.read(file, "the recipe"), file)
    return found == yaml_document.parse(recipe.to_yaml(), file)[0]


class Folder:
    """The folder of a comparison."""

    def __init__(self, comparison: Comparison):
        self.comparison = comparison
        self.entries: list[Entry] = entries(comparison)
        self.to_measure = _to_measure(comparison)  # what is wrong with it is said before anything is trained
        eval_rows.refuse_missing(comparison.forgetting)
        self.path = Path(comparison.output_dir)
        self.file, self.lock_file = self.path / FILE, self.path / "lock"
        self.scores = _score_name(self)  # of RunDir.score_files

    def run(self, entry) -> RunDir:
        return RunDir(entry.recipe.output_dir)

    def recipe_file(self, entry) -> Path:
        return self.path / "recipes" / f"{entry.name}.yaml"

    def log_file(self, entry) -> Path:
        return self.path / "logs" / f"{entry.name}.txt"

    def failure_file(self, entry) -> Path:
        return self.path / "failed" / f"{entry.name}.json"

    def refuse_used(self, resume: bool):
        """Raise InputError if the folder holds something that is not to be resumed, or nothing where that is asked for; or if a
        training there had another recipe."""
        if not resume:
            if self.file.is_file():
                raise InputError(
                    f"output_dir {self.path} holds a comparison; go on with it by --resume, or set output_dir=ANOTHER_FOLDER"
                )
            refuse_nonempty(self.path, "output_dir", but=self.lock_file)
        elif not self.file.is_file():
            raise InputError(f"output_dir {self.path} holds no comparison to resume; leave out --resume")
        for entry in self.entries:
            if self.run(entry).in_use():
                raise InputError(
                    f"{self.run(entry).path}: a process trains there; wait for it to end, then go on with --resume"
                )
        for entry in self.entries:
            file = self.recipe_file(entry)
            if file.is_file() and not _says(file, entry.recipe):
                raise InputError(
                    f"{entry.name} was trained with another recipe ({file}); change it back, or remove "
                    f"{self.run(entry).path} and {file} to train it anew"
                )

    def begin(self):
        """Write what is compared into the folder."""
        write_text(self.file, as_yaml(self.comparison.model_dump()))  # first: with it alone --resume goes on
        for name in ("recipes", "logs", "failed"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        for entry in self.entries:
            write_text(self.recipe_file(entry), entry.recipe.to_yaml())

    def state(self, entry) -> tuple[str, str]:
        """Return (status, message) of a training by what lies in its folder. Status: "done", "does not fit", "diverged",
        "failed", "unfinished" or "to do"."""
        failure, run = self.failure_file(entry), self.run(entry)
        if run.adapter.is_dir() and self._is_measured(entry, run):
            return DONE, ""
        if failure.is_file():
            found = files.read_object(failure)
            return str(found.get("status")), str(found.get("message"))
        return (UNFINISHED, "") if run.recipe_file.is_file() else (TO_DO, "")

    def _is_measured(self, entry, run):
        """Return whether a run has the score that is wanted now: another may have been before the file was changed."""
        if not all(file.is_file() for file in run.score_files(self.scores)):
            return False
        if entry.recipe.task != "text-generation":
            return True
        found, wanted = run.scores(self.scores), self.comparison
        return (
            extract_of(found) == wanted.extract
            and (found.get("forgetting") or {}).get("data") == wanted.forgetting
            and found.get("metrics", {}).keys() >= set(self.to_measure)
        )

    def try_again(self):
        """Forget which trainings failed: what ended them, a full disk or kill -9, may be over. What did not fit or diverged would
        do so again."""
        for entry in self.entries:
            if self.state(entry)[0] == FAILED:
                self.failure_file(entry).unlink()

    def failed(self, entry, status, message):
        write_json(self.failure_file(entry), {"status": status, "message": message})


def _score_name(folder):
    """Return the name of the score that all trainings of a Folder get; see RunDir.score_files.

    Raises:
        InputError: they would be measured on other rows each, or what decides is not measured on these.
    """
    wanted, first = folder.comparison, folder.entries[0].recipe
    encoder = encoder_of(first.task, first.objective)
    if wanted.data is None:
        for entry in folder.entries:
            if _held_out(entry.recipe) != _held_out(first):
                raise InputError(
                    f"{folder.entries[0].name} and {entry.name} hold out different rows (data.eval, data.eval_fraction, or "
                    "pairs and rows), so their scores do not say which is better; set data: FILE, rows that all are evaluated on"
                )
    else:
        encoder = _encoder_of_all(folder)
    of_pairs = {*preferences.METRICS} & {wanted.metric, *wanted.metrics}
    if of_pairs and encoder is not data.Preferences:
        raise InputError(
            f"{sorted(of_pairs)[0]} is measured on pairs, and the evaluated rows are not pairs; set data: FILE with chosen and "
            "rejected answers"
        )
    if wanted.data is None:
        return eval_rows.score_name(first.task, wanted.max_rows)
    return eval_rows.name_of_file(wanted.data, first.task, wanted.max_rows)


def _encoder_of_all(folder):
    """Return what makes examples of the rows that all are evaluated on; raises InputError unless it is the same for all."""
    path, found = folder.comparison.data, []
    for entry in folder.entries:
        section = Data.of_file(path, entry.recipe.data.model_dump())
        found.append(eval_rows.encoder_of_file(section, entry.recipe.task, entry.recipe))
        if section.columns:
            found[-1].refuse_columns(section.columns)
        if found[-1] is not found[0]:
            raise InputError(
                f"data {path}: read in different ways by {folder.entries[0].name} and {entry.name}; see data.columns of both"
            )
    return found[0]


def _held_out(recipe):
    """Return what decides which rows a training holds out, and of what kind they are."""
    section = recipe.data
    rows = section.eval or (section.train, section.eval_fraction, recipe.seed_of_rows)
    return recipe.task, encoder_of(recipe.task, recipe.objective), rows


def train_one(folder: Folder, entry: Entry) -> None:
    """Train and evaluate one training of a comparison, or go on with it; what did not end well is in its failure_file.

    Raises:
        Interrupted: by a signal, which the process that trains got too.
    """
    run, wanted = folder.run(entry), folder.comparison
    start = entry.recipe.model.adapter_name_or_path
    if entry.after is not None and not RunDir(start).adapter.is_dir():
        folder.failed(entry, FAILED, f"it starts from {entry.after}, which did not end well")
        return
    if not run.adapter.is_dir():
        # what was set aside is kept, and train says what to do; what a kill has left of the first checkpoint is nothing
        go_on = any(path.suffix != ".partial" for path in run.checkpoints.glob("step-*"))
        if run.recipe_file.is_file() and not go_on:
            shutil.rmtree(run.path)
        recipe = str(folder.recipe_file(entry))
        if not _ended_well(folder, entry, ["train", recipe, *(["--resume"] if go_on else [])]):
            return
    options = [] if wanted.max_rows is None else ["--max-rows", str(wanted.max_rows)]
    options += [] if wanted.data is None else ["--data", wanted.data]
    if entry.recipe.task == "text-generation":
        options += ["--latency"]
        options += [part for name in folder.to_measure for part in ("--metric", name)]
        options += [] if wanted.extract is None else ["--extract", wanted.extract]
        options += [] if wanted.forgetting is None else ["--forgetting", wanted.forgetting]
        known = _with_the_same_base(folder, entry)
        options += [] if known is None else ["--before-of", str(known.path)]
    _ended_well(folder, entry, ["eval", str(run.path), *options])


def _with_the_same_base(folder, entry):
    """Return the run of another training that was evaluated, whose base answers as that of `entry`: it need not be asked
    again; None where there is none."""
    others = [other for other in folder.entries if other is not entry and folder.state(other)[0] == DONE]
    if not others:
        return None
    base = of_the_base(folder.run(entry))
    return next((run for run in map(folder.run, others) if of_the_base(run) == base), None)


_ALWAYS = (
    scores.LOSS,
    scores.BITS_PER_BYTE,
    "exact_match",
    "json_fields",
    *preferences.METRICS,
)  # or where it fits the rows


def _to_measure(comparison) -> list[str]:
    """Return the metrics that are to be asked for by name: others than those that are measured anyway.

    Raises:
        InputError: there is no such metric, or what it needs is not installed.
    """
    names = dict.fromkeys([*comparison.metrics, comparison.metric])
    found = [name for name in names if name not in _ALWAYS]
    Asked(metrics=found, extract=comparison.extract)
    return found


def _ended_well(folder, entry, arguments):
    code, said = launch(arguments, folder.log_file(entry))
    if code == 0:
        return True
    if code in (130, 143):
        raise Interrupted(code - 128)
    status = {DoesNotFit.exit_code: "does not fit"}.get(code, FAILED)
    if code == TrainingFailed.exit_code and "diverged" in said:
        status = "diverged"
    if code < 0:
        said = f"ended by signal {-code}" + (": the system ran out of memory?" if code == -9 else "")
    folder.failed(entry, status, said)
    return False


def launch(arguments, log) -> tuple[int, str]:
    """Run `qlora` with these arguments in a process of its own; return its exit code and the message that it ended with.

    What it prints goes to the file `log` and, indented, to stderr. It ends, and saves a checkpoint first, when this process
    closes its stdin, whatever the reason: kill -9 too.

    Raises:
        InputError: the log cannot be written.
        Interrupted: by a signal; the process has ended.
    """
    command = [sys.executable, "-m", "qlora", *arguments]
    pipes: dict = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    settings: dict = {"encoding": "utf-8", "errors": "replace", "env": os.environ | {ENDS_WITH_STDIN: "1"}}
    lines = []
    with _log(log) as write, subprocess.Popen(command, **pipes, **settings) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                write(line)
                note(f"  {lines[-1]}")
        except (Interrupted, KeyboardInterrupt):
            process.stdin.close()
            for line in process.stdout:
                write(line)
            raise
        code = process.wait()
    last = next((number for number in range(len(lines) - 1, -1, -1) if lines[number].startswith("qlora: ")), None)
    said = "\n".join(lines[-1:] if last is None else lines[last:]).removeprefix("qlora: ")
    return code, said


@contextlib.contextmanager
def _log(path):
    """Yield write(line), which adds a line to the file `path`, at once: what this process has not written, kill -9 would lose."""

    def added(line):
        try:
            file.write(line.encode())
        except OSError as error:
            raise _refused(path, error) from None

    try:
        file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed below)
    except OSError as error:
        raise _refused(path, error) from None
    with file:
        yield added


def _refused(path, error):
    return InputError(f"{path}: {error.strerror or error}; see to that, then go on with --resume")


# ---- what run folders say --------------------------------------------------------------------------------------------


def of_the_base(run: RunDir) -> dict:
    """Return {what decides how the base of a run answers, and which tokens its loss is of: equal for equal ones}."""
    there, recipe = run.environment(), run.recipe()
    base, section = there["base_model"], recipe.data
    return {
        "base model": (base["sha256"], base.get("quantized_sha256"), base.get("kept_tensors")),
        "quantization": recipe.quantization,
        "device or dtype": (there["device"], there["compute_dtype"], recipe.model.dtype),
        "chat template": (section.chat_template, section.system_as_user),
        "data.train_on or data.thoughts": (section.train_on, section.thoughts),
        "version": there["versions"],
    }


@dataclass(frozen=True)
class Measured:
    """What the folder of a finished run says. result: of eval.json; parts: {metric: (N, K)} of its answers, loss too; rows:
    what was asked, to see that two are of the same rows; answers: to them, none where rows are plain text."""

    result: dict
    parts: dict[str, np.ndarray]
    rows: list
    answers: list


def measured(run: RunDir, name=None, when="after") -> Measured:
    """Return what a finished run measured on its held-out rows, "after" its training or "before". name: of the score, see
    RunDir.score_files.

    Raises:
        InputError: it was not evaluated, or its folder is damaged.
    """
    result, (_, answers) = run.scores(name), run.score_files(name)
    if result is None or not answers.is_file():
        counts = eval_rows.counts_of(run, name)
        said = "not evaluated yet (or by an older version)"
        if counts:
            said = f"evaluated only on the first {max(counts)} of these rows"
        raise InputError(f"{run.path}: {said}; run:  qlora eval {shlex.quote(str(run.path))}")
    try:
        lines = list(map(json.loads, files.lines_of(answers)))
        found = [line[when] for line in lines]
        parts = {
            name: np.array([answer_metrics.from_json(one[name]) for one in found])
            for name in found[0]
            if name != "answer"
        }
        rows = [
            ({key: line[key] for key in line.keys() - {"before", "after", "expected", "judge"}}, line.get("expected"))
            for line in lines
        ]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{answers}: {error!r}; the run folder is damaged") from None
    return Measured(result, parts, rows, [one["answer"] for one in found if "answer" in one])


def value_of(name, found: Measured):
    """Return the function of sums of parts that the metric `name` is, such as intervals.py takes; None for a metric that is
    not measured."""
    if name not in found.parts:
        return None
    if name in (scores.LOSS, scores.BITS_PER_BYTE, *preferences.METRICS):
        return ratio
    return answer_metrics.named(name, [expected for _, expected in found.rows]).value


def row_of(run: RunDir, name=None, status=DONE, message="") -> dict[str, Any]:
    """Return the numbers of a run as a comparison's row has them; None for what is not known. name: of its score."""
    found: dict[str, Any] = {"run": str(run.path), "status": status, "message": message, "metrics": {}}
    found |= dict.fromkeys(NUMBERS)
    if not run.adapter.is_dir():
        return found
    steps = [line for line in record.read(run) if isinstance(line, record.Step)]
    found["seconds"] = steps[-1].time if steps else None
    if run.memory_file.is_file():  # a run of an older version may not have it
        found["peak_bytes"] = files.read_object(run.memory_file).get("peak_bytes")
    counts = run.environment().get("parameters")
    if counts:
        found["trainable_parameters"] = counts["trainable"]
        found["trainable_share"] = counts["trainable"] / counts["total"]
    found["saved_bytes"] = sum(file.stat().st_size for file in run.adapter.glob("*.safetensors"))
    if (result := run.scores(name)) is not None:
        found |= {name: result.get(name) for name in ("metrics", *OF_LOSS)}
        found["forgetting"] = (result.get("forgetting") or {}).get("value")
        found["latency_seconds"] = (result.get("latency") or {}).get("token")
    return found
