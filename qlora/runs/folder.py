"""The run folder: where each file is, and what makes a run complete.

recipe.yaml       the resolved recipe, copied first
environment.json  versions, device, base-model and data hashes
adapter/          PEFT format, tokenizer, chat template; appears by rename, so a folder is either whole or absent;
                  manifest.json in it has the hashes of the others and of the base
model/            instead of adapter/ for full fine-tuning: an ordinary model folder
adapter-step-20/  what adapter/ was, with its eval.json, before a finished run was continued
checkpoints/      step-20/ and so on, see checkpoints.py; appear by rename too
lock              held by the process that trains here; holds its number
memory.json       layers that were checkpointed, and the memory that was predicted and measured; also after running out
metrics.jsonl     one JSON object a logged step; TensorBoard events in tensorboard/
ended.json        how a training ended that did not finish: {"status", "message"}; goes away when it goes on
reference.safetensors  of preference pairs: the log probability of each answer before the first step
proof_rows.json   token ids of the rows that export's proof uses, so that it needs no data file
data_report.json
trackers.json     which run of trackio, wandb or mlflow this one is
eval.json         the score on the run's own held-out rows, and what they were
answers.jsonl     its answers: an object a row, with what was asked and expected, and what each answer counts
evals/            scores on other rows, never taken for the run's own
votes.jsonl       blind votes between its answers and its base's, a line each
served.json       what it costs and keeps in each form that it can be served in; .md and .csv say the same
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import tempfile
from pathlib import Path

from ..recipe import Recipe
from ..system import files
from ..system.errors import DoesNotFit, InputError, Interrupted
from ..system.secrets import redacted
from ..system.storage import is_locked, locked, refuse_nonempty, remove_lock, write_json, write_text


def step_of(path):
    """Return the step of a checkpoint folder; None of what a kill has left half written, or was set aside."""
    found = re.fullmatch(r"step-(\d{1,18})", path.name)
    return int(found[1]) if found and path.is_dir() else None


class RunDir:
    """Paths of one run folder."""

    def __init__(self, path):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.environment_file = self.path / "environment.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.memory_file = self.path / "memory.json"
        self.ended_file = self.path / "ended.json"
        self.tensorboard = self.path / "tensorboard"
        self.trackers_file = self.path / "trackers.json"
        self.data_report_file = self.path / "data_report.json"
        self.proof_rows_file = self.path / "proof_rows.json"
        self.reference_file = self.path / "reference.safetensors"
        self.eval_file = self.path / "eval.json"
        self.answers_file = self.path / "answers.jsonl"
        self.evals = self.path / "evals"
        self.votes_file = self.path / "votes.jsonl"
        self.served_files = [self.path / f"served.{kind}" for kind in ("json", "md", "csv")]
        self.checkpoints = self.path / "checkpoints"
        self.lock_file = self.path / "lock"

    @property
    def adapter(self):
        """The folder of what was trained: model/ of a full fine-tuning, else adapter/."""
        whole = self.path / "model"
        return whole if whole.is_dir() else self.path / "adapter"

    @classmethod
    @contextlib.contextmanager
    def create(cls, recipe: Recipe):
        """Yield a new run folder at `recipe.output_dir` that holds the resolved recipe, locked while the block runs.

        Nothing of it is left where the block finds an input wrong, or is interrupted, before training has begun.

        Raises:
            InputError: it holds something already, is a file, or cannot be written; or another process has it.
        """
        run = cls(recipe.output_dir)
        run.refuse_used()
        made = not run.path.exists()
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output_dir {run.path}: {error.strerror}; choose another folder") from None
        with run.locked():
            run.refuse_used()  # another process may have come first
            try:
                run.write_recipe(recipe)
                yield run
            except (InputError, Interrupted):
                if not run.metrics_file.exists():
                    run._remove(made)
                raise

    def _remove(self, folder_too):
        """Remove the files of a run that has not begun to train."""
        mine = (self.recipe_file, self.environment_file, self.data_report_file, self.proof_rows_file, self.memory_file,
                self.reference_file)  # fmt: skip
        for file in mine:
            file.unlink(missing_ok=True)
        remove_lock(self.lock_file)
        if folder_too and not any(self.path.iterdir()):
            self.path.rmdir()

    def write_recipe(self, recipe):
        try:
            write_text(self.recipe_file, recipe.to_yaml())
        except OSError as error:
            raise InputError(f"output_dir {self.path}: {error.strerror}; choose another folder") from None

    @contextlib.contextmanager
    def locked(self):
        """Have this folder alone while the block runs. The lock goes with the process, however that ends.

        Raises:
            InputError: another process has it; names its number.
        """
        with locked(self.lock_file, f"output_dir {self.path}", "set output_dir=ANOTHER_FOLDER"):
            yield

    @contextlib.contextmanager
    def says_how_it_ends(self):
        """Keep in ended.json which error ends a training in the block; of a killed process there is none."""
        try:
            yield
        except InputError:  # said before anything was trained
            raise
        except BaseException as error:
            kinds = {Interrupted: "stopped", DoesNotFit: "does not fit"}
            status = next((said for kind, said in kinds.items() if isinstance(error, kind)), "failed")
            signal = f"signal {error.number}" if isinstance(error, Interrupted) else ""
            if (
                self.metrics_file.exists() and not self.adapter.is_dir()
            ):  # a finished run that could not go on is as it was
                message = redacted(str(error)) or signal or type(error).__name__
                with contextlib.suppress(OSError):  # the disk may be full
                    write_json(self.ended_file, {"status": status, "message": message})
            raise

    def ended(self):
        """Return {"status", "message"} of a training that ended with an error; None where it did not, or went on."""
        return files.read_object(self.ended_file) if self.ended_file.is_file() else None

    def in_use(self):
        """True if a process trains here at this moment."""
        return is_locked(self.lock_file)

    def refuse_unwritable(self):
        """Raise InputError if nothing can be written into this folder, before hours of work are to be kept in it."""
        try:
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise InputError(
                f"{self.path}: {error.strerror}; what is found is kept there: copy the run folder, and name the copy"
            ) from None

    def refuse_used(self):
        """Raise InputError if a new run cannot start here."""
        if self.recipe_file.exists() and not self.adapter.exists():
            resume = self._how_to_resume("", ", ")
            raise InputError(
                f"output_dir {self.path} contains an unfinished run; {resume}remove it or set output_dir=ANOTHER_FOLDER"
            )
        if self.recipe_file.exists():
            raise InputError(
                f"output_dir {self.path} contains a finished run, which is never overwritten; remove it or set "
                "output_dir=ANOTHER_FOLDER"
            )
        refuse_nonempty(self.path, "output_dir", but=self.lock_file)

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of the checkpoints, oldest first."""
        found = map(step_of, self.checkpoints.glob("step-*"))
        return sorted(step for step in found if step is not None)

    def _how_to_resume(self, before, after=""):
        """Return it in words, between these; "" where there is no checkpoint."""
        there = self.checkpoint_steps()
        command = f"qlora train {shlex.quote(str(self.recipe_file))} --resume"
        return f"{before}resume it with `{command}`{after}" if there else ""

    @classmethod
    def is_run(cls, path):
        """True if `path` is a run folder, finished or not (a model folder has config.json and no recipe.yaml)."""
        return (Path(path) / "recipe.yaml").is_file()

    @classmethod
    def open(cls, path):
        """Return the finished run in `path`; raises InputError if there is none."""
        run = cls(path)
        refuse_recipe(path)
        if not run.path.exists():
            raise InputError(f"no run at {path}; `qlora train RECIPE` makes one")
        if not run.recipe_file.is_file():
            raise InputError(f"{path} is not a run folder: it has no recipe.yaml")
        if not run.adapter.is_dir():
            raise InputError(f"{path} did not finish training: it has no adapter/{run._how_to_resume('; ')}")
        return run

    def recipe(self):
        return Recipe.load(self.recipe_file)

    def environment(self):
        return self._read(self.environment_file)

    def score_files(self, name=None):
        """Return (scores, answers), two files: the run's own, or those in evals/ with this name."""
        if name is None:
            return self.eval_file, self.answers_file
        return self.evals / f"{name}.json", self.evals / f"{name}-answers.jsonl"

    def scores(self, name=None):
        """Return what eval.json says, metrics as {"value", "low", "high"}; None where there is none. name: see score_files.

        Older versions wrote a metric as a number, without its interval.
        """
        file, _ = self.score_files(name)
        if not file.is_file():
            return None
        found = self._read(file)
        try:
            for one in filter(None, (found, found.get("before"))):
                for name, metric in one["metrics"].items():
                    if not isinstance(metric, dict):
                        one["metrics"][name] = {"value": float(metric), "low": None, "high": None}
                    for key in ("value", "low", "high"):
                        files.refuse_no_number(f"{name}.{key}", one["metrics"][name].get(key))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{file}: {error!r}; the run folder is damaged") from None
        return found

    def data_report(self):
        return self._read(self.data_report_file)

    def proof_rows(self):
        return self._read(self.proof_rows_file)

    def _read(self, file):
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{file}: {error}; the run folder is damaged") from None


def named_runs(pairs):
    """Return {name: run folder} of NAME=RUN words."""
    found: dict = {}
    for pair in pairs:
        name, equals, run = pair.partition("=")
        if not (name and equals and run):
            raise InputError(f"--adapter {pair}: write NAME=RUN, such as --adapter b=runs/b")
        if name in found:
            raise InputError(f"--adapter {name}: given twice, for {found[name]} and {run}")
        found[name] = run
    return found


def extract_of(scores: dict) -> str | None:
    """Return the `extract` that cut the answers of a run's `scores`, see evaluation.asked; None: they are compared whole."""
    return scores.get("data", {}).get("extract")


def refuse_recipe(path):
    """Raise InputError where `path` is a recipe, which was named in place of the run that it trains; says which that is."""
    file = Path(path)
    if file.suffix.lower() not in (".yaml", ".yml") or not file.is_file():
        return
    try:
        folder = Recipe.load(file).output_dir
    except InputError:  # it is another YAML file
        return
    if RunDir.is_run(folder):
        raise InputError(f"{path} is a recipe; name the folder of its run: {folder}")
    raise InputError(
        f"{path} is a recipe that was not trained yet: qlora train {shlex.quote(str(path))}, then name its run {folder}"
    )
