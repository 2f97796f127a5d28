"""Trackers beside TensorBoard, through transformers' integrations: trackio, wandb, mlflow.

None may slow or end a training. Each has a thread of its own, which alone talks to it: a library that waits for its server makes
nobody else wait.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import io
import os
import queue
import threading
from pathlib import Path
from types import SimpleNamespace

from ..system import files
from ..system.errors import InputError
from ..system.events import heard_by, note
from ..system.extras import how_to_install
from ..system.load import Load
from ..system.storage import write_json
from . import record

PROJECT = "qlora"  # where the library's own environment variable names none
_BEGIN, _END = 30, 30  # seconds that a training waits for a tracker, before and after its steps


def refuse_missing(names):
    """Raise InputError if a tracker that is to be reported to is not installed."""
    missing = [name for name in names if name in _KINDS and importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"training.report_to: {' and '.join(missing)} not installed; install with:  {how_to_install(*missing)}  or leave it "
            "out"
        )


@contextlib.contextmanager
def tracked(run, names, settings):
    """Tell the trackers of `names` what is emitted in the block, a training of a RunDir; a run that goes on is theirs of then.

    settings: {name: value} of the recipe, and what else is to be seen beside the numbers.
    """
    trackers = [Tracker(_KINDS[name](run, settings), run) for name in names if name in _KINDS]
    failed = True
    try:
        with _silent(trackers):
            for tracker in trackers:
                tracker.begin()
        with heard_by(*trackers):
            yield
        failed = False
    finally:
        with _silent(trackers):
            for tracker in trackers:
                tracker.end(failed)


class Tracker:
    """A listener: hands what a training tells to a `kind` below, in its thread; the first error is said, and ends that."""

    def __init__(self, kind, run):
        self.kind, self.run, self.load = kind, run, Load()
        self.todo: queue.SimpleQueue = queue.SimpleQueue()
        self.has_begun, self.failed = threading.Event(), False
        # the thread's notes are heard by whoever listens here
        work = contextvars.copy_context().run
        self.thread = threading.Thread(target=work, args=(self._work,), daemon=True, name=f"tracker {kind.name}")

    def __call__(self, event):
        if isinstance(event, record.Begun) and self.kind.id is not None:
            keep_id(self.run, self.kind.name, self.kind.id)
        elif isinstance(event, record.Step):
            self.todo.put((event.step, record.numbers_of(event) | self.load.now()))
        elif isinstance(event, record.Evaluation | record.Norms | record.Trained):
            self.todo.put((event.step, record.numbers_of(event)))

    def begin(self):
        self.thread.start()
        if not self.has_begun.wait(_BEGIN):
            note(
                f"tracker   {self.kind.name} has not answered in {_BEGIN} s; events wait for it, the training does not"
            )

    def end(self, failed):
        if self.thread.ident is None:  # what came before it was interrupted
            return
        self.todo.put(failed)
        self.thread.join(_END)
        if self.thread.is_alive():
            note(f"tracker   {self.kind.name} has not taken everything in {_END} s; the rest is left out")

    def _work(self):
        try:
            self.kind.begin(known_ids(self.run).get(self.kind.name))
            self.has_begun.set()
            while not isinstance(told := self.todo.get(), bool):
                self.kind.log(*told)
            self.kind.end(told)
        except (Exception, SystemExit) as error:  # of any library, for any reason
            why = " ".join(str(error).split()) or type(error).__name__
            note(f"tracker   {self.kind.name}: {why[:300]}; the training goes on without it")
        finally:
            self.has_begun.set()


def flat(values, prefix=""):
    """Return {"section.field": value} of nested dicts: numbers and words as they are, lists as text."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def known_ids(run):
    """Return {tracker: id of the run there} of trackers.json."""
    return files.read_object(run.trackers_file) if run.trackers_file.is_file() else {}


def keep_id(run, name, identity):
    write_json(run.trackers_file, known_ids(run) | {name: identity})


@contextlib.contextmanager
def _silent(trackers):
    """Keep what the libraries print, greetings and addresses, off stdout, which is a command's result."""
    with contextlib.redirect_stdout(io.StringIO()) if trackers else contextlib.nullcontext():
        yield


# ---- the libraries ---------------------------------------------------------------------------------------------------


class _Kind:
    """One library: transformers' callback for it, told what it would be told by its Trainer. id: of the run there."""

    name = ""

    def __init__(self, run, settings):
        self.run, self.settings, self.id = run, settings, None
        # what the callback asks of TrainingArguments; those that a recipe does not have would only be in the way
        self.arguments = SimpleNamespace(
            to_dict=lambda: dict(settings),
            run_name=run.path.name,
            output_dir=str(run.path),
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            trackio_space_id=None,  # trackio reads TRACKIO_SPACE_ID itself
            trackio_bucket_id=None,
            trackio_static_space_id=False,
            hub_private_repo=True,
        )

    def begin(self, identity):
        """Open the run there; identity: of the one that goes on, or None."""
        from transformers import TrainerControl, TrainerState
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        self.callback = INTEGRATION_TO_CALLBACK[self.name]()
        self.told = (self.arguments, TrainerState(), TrainerControl())
        self.open(identity)
        self.callback.on_train_begin(*self.told)

    def open(self, identity):
        raise NotImplementedError

    def log(self, step, numbers):
        self.told[1].global_step = step
        self.callback.on_log(*self.told, logs=numbers)

    def end(self, failed):
        self.callback.on_train_end(*self.told)


class _Trackio(_Kind):
    """On this machine, unless TRACKIO_SPACE_ID names a space. It knows a run by its name, and goes on with it."""

    name = "trackio"

    def open(self, identity):
        self.id = self.arguments.run_name = identity or self._new_name()

    def _new_name(self):
        """Runs of the same name are one run there: one of another folder, or of before this one was removed."""
        return f"{self.run.path.name}-{os.urandom(3).hex()}"


class _Wandb(_Kind):
    """Offline without a key, with HF_HUB_OFFLINE, and where the server is not reached; never asks for a login."""

    name = "wandb"

    def open(self, identity):
        import wandb

        self.wandb = wandb
        settings = {"silent": True, "console": "off", "init_timeout": _BEGIN - 10, "login_timeout": 1}
        self.id = identity or os.urandom(4).hex()
        given = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": self.run.path.name,
            "id": self.id,
            "resume": "allow",
            "settings": wandb.Settings(**settings),
        }
        mode = os.environ.get("WANDB_MODE") or ("online" if self._may_connect() else "offline")
        try:
            wandb.init(**given, mode=mode)
        except wandb.errors.CommError:
            wandb.init(**given, mode="offline")
        if wandb.run is not None and wandb.run.settings.mode == "offline":
            self._say_offline(identity)

    def _say_offline(self, identity):
        append = "" if identity is None else "--append "  # a second folder of the same run
        note(f"tracker   wandb is offline; later:  wandb sync {append}{Path(self.wandb.run.dir).parent}")

    def _may_connect(self):
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            return False
        os.environ.setdefault("WANDB_SILENT", "true")
        return self.wandb.login(prompt=False)

    def end(self, failed):
        self.wandb.finish(exit_code=int(failed))


class _Mlflow(_Kind):
    """Where MLFLOW_TRACKING_URI says, or in mlflow's own default place."""

    name = "mlflow"

    def open(self, identity):
        import mlflow

        self.mlflow = mlflow
        if identity is None:
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self.id = mlflow.start_run(run_id=identity, run_name=self.run.path.name).info.run_id
        # it has a limit for a value, and refuses another value of a name: of a run that goes on, those of then stay
        known = {} if identity is None else mlflow.get_run(identity).data.params
        longest = mlflow.utils.validation.MAX_PARAM_VAL_LENGTH
        self.arguments.to_dict = lambda: {
            name: str(value)[:longest] for name, value in self.settings.items() if name not in known
        }

    def end(self, failed):
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


_KINDS = {kind.name: kind for kind in (_Trackio, _Wandb, _Mlflow)}
