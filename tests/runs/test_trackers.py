"""Trackers hear what a training tells, and neither slow it, nor end it, nor ask anybody.

Small stand-ins for the libraries, driven by transformers' own callbacks; the libraries themselves where they are installed.
"""

import importlib
import json
import sys
import time
from typing import get_args

import pytest

from qlora import train
from qlora.recipe import Training
from qlora.runs import record, trackers
from qlora.runs.folder import RunDir
from qlora.runs.record import Begun, Evaluation, Norms, Step, Trained
from qlora.system import events
from qlora.system.errors import InputError, TrainingFailed

STEP = Step(1, 0.5, 2.25, 1e-4, 0.75, 100, 50.0, 2**30, 2.0, {"mean_rank": 6.0})
SETTINGS = {"training.learning_rate": 1e-4, "model.name_or_path": "x" * 1000}

# what transformers' callbacks and qlora/runs/trackers.py call of each; CALLS has what they were told
STAND_INS = {
    "trackio": """
        import types
        CALLS = []
        __version__ = "0.43.0"
        context_vars = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))
        class config:
            def update(values, allow_val_change): CALLS.append(("config", values))
        def init(**given):
            print("* Trackio project initialized")
            CALLS.append(("init", given))
        def log(values): CALLS.append(("log", values))
        def finish(): CALLS.append(("finish", {}))
    """,
    "wandb": """
        import types
        CALLS, run, KEY, REACHED = [], None, False, True
        class Settings(dict):
            def __init__(self, **given): super().__init__(given)
        class config(dict):
            def update(values, allow_val_change): CALLS.append(("config", values))
        class errors:
            class CommError(Exception): pass
        def init(**given):
            global run
            CALLS.append(("init", given))
            if given["mode"] == "online" and not REACHED:
                raise errors.CommError("no route")
            settings = types.SimpleNamespace(mode=given["mode"])
            run = types.SimpleNamespace(settings=settings, dir="wandb/offline-run/files", summary={}, _label=lambda **_: None)
        def login(prompt):
            CALLS.append(("login", {"prompt": prompt}))
            return KEY
        def define_metric(*_, **__): pass
        def log(values): CALLS.append(("log", values))
        def finish(exit_code): CALLS.append(("finish", {"exit_code": exit_code}))
    """,
    "mlflow": """
        import types
        CALLS, __version__, KNOWN = [], "3.17.2", {}
        utils = types.SimpleNamespace(validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))
        run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="made"), data=types.SimpleNamespace(params=KNOWN))
        def set_experiment(name): CALLS.append(("experiment", name))
        def start_run(run_id, run_name):
            CALLS.append(("init", {"run_id": run_id}))
            return run
        def get_run(run_id): return run
        def active_run(): return run
        def is_tracking_uri_set(): return True
        def get_tracking_uri(): return "file:."
        def log_params(values, synchronous): CALLS.append(("config", values))
        def log_metrics(metrics, step, synchronous): CALLS.append(("log", metrics | {"step": step}))
        def end_run(status="FINISHED"): CALLS.append(("finish", {"status": status}))
    """,
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Return library(name) -> the stand-in, importable."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for name in ("HF_HUB_OFFLINE", "WANDB_MODE", "WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)

    def library(name):
        lines = STAND_INS[name].splitlines()
        place = folder / name
        files = {
            place: "\n".join(line.removeprefix(" " * 8) for line in lines),
            place / "sdk": "",
            place / "sdk" / "lib": "",
        }
        files[place / "sdk" / "lib" / "config_util"] = "class ConfigError(Exception): pass"
        for package, text in files.items():
            package.mkdir()
            (package / "__init__.py").write_text(text)
            module = ".".join(package.relative_to(folder).parts)
            monkeypatch.setitem(sys.modules, module, None)  # so that it is gone after the test
            del sys.modules[module]
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return library


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def told(run, name, *more, settings=SETTINGS):
    """Track a small training of these events; return the notes."""
    notes = []
    with events.heard_by(lambda event: notes.append(event.text) if isinstance(event, events.Note) else None):  # noqa: SIM117
        with trackers.tracked(run, ["tensorboard", name], settings):
            for event in (Begun(0, 2, 0), STEP, *more):
                events.emit(event)
    return notes


def of(library, kind):
    return [values for name, values in library.CALLS if name == kind]


@pytest.mark.parametrize("name", STAND_INS)
def test_a_tracker_gets_settings_steps_evaluations_norms_and_what_came_of_it(library, run, name):
    fake = library(name)
    told(
        run,
        name,
        Evaluation(1, 0.5, 2.0, 3.0),
        Norms(1, {"adapter_norm/layer_00": 1.5}),
        Trained(2, {"final_loss": 1.0}),
    )
    (config,), logged = of(fake, "config"), of(fake, "log")
    assert float(config["training.learning_rate"]) == 1e-4
    prefix, evaluated = ("", "eval_loss") if name == "mlflow" else ("train/", "eval/loss")
    assert [logged[0][f"{prefix}{key}"] for key in ("loss", "grad_norm", "mean_rank")] == [2.25, 0.75, 6.0]
    assert 0 <= logged[0][f"{prefix}cpu_use"] <= 1
    assert logged[1][evaluated] == 2.0
    assert logged[2][f"{prefix}adapter_norm/layer_00"] == 1.5
    assert logged[3][f"{prefix}final_loss"] == 1.0
    assert len(of(fake, "finish")) == 1


@pytest.mark.parametrize("name", STAND_INS)
def test_a_run_that_goes_on_is_the_same_run_there(library, run, name):
    first = library(name)
    told(run, name)
    kept = trackers.known_ids(run)[name]
    told(run, name)
    key = {"trackio": "name", "wandb": "id", "mlflow": "run_id"}[name]
    assert [given[key] for given in of(first, "init")] == [None if name == "mlflow" else kept, kept]
    assert trackers.known_ids(run) == {name: kept}


def test_mlflow_keeps_the_settings_of_then_which_it_cannot_change(library, run):
    fake = library("mlflow")
    told(run, "mlflow")
    fake.KNOWN |= of(fake, "config")[0]
    told(run, "mlflow", settings=SETTINGS | {"training.learning_rate": 5.0, "new": 1})
    assert of(fake, "config")[1:] == [{"new": "1"}]
    assert len(of(fake, "config")[0]["model.name_or_path"]) == 500  # its limit


@pytest.mark.parametrize(
    ("key", "offline", "reached", "modes"),
    [
        (False, False, True, ["offline"]),
        (True, False, True, ["online"]),
        (True, False, False, ["online", "offline"]),
        (True, True, True, ["offline"]),
    ],
    ids=["no key", "key", "no network", "HF_HUB_OFFLINE"],
)
def test_wandb_never_asks_and_is_offline_where_it_must_be(library, run, monkeypatch, key, offline, reached, modes):
    fake = library("wandb")
    fake.KEY, fake.REACHED = key, reached
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notes = told(run, "wandb")
    assert [given["mode"] for given in of(fake, "init")] == modes
    assert all(given == {"prompt": False} for given in of(fake, "login"))
    assert ["wandb sync" in note for note in notes] == [True] * (modes[-1] == "offline")
    assert of(fake, "init")[0]["settings"]["console"] == "off"  # it would take stdout and the view with it


@pytest.mark.parametrize(("name", "failed"), [("wandb", {"exit_code": 1}), ("mlflow", {"status": "FAILED"})])
def test_a_training_that_fails_has_failed_there(library, run, name, failed):
    fake = library(name)

    def fail():
        with trackers.tracked(run, [name], SETTINGS):
            raise TrainingFailed("no")

    with pytest.raises(TrainingFailed):
        fail()
    assert of(fake, "finish") == [failed]


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_tracker_that_raises_is_named_once_and_the_rest_goes_on(library, run, broken):
    fake, count = library("trackio"), []

    def fail(*_, **__):
        count.append(1)
        raise OSError("the\nserver is gone")

    setattr(fake, broken, fail)
    notes = told(run, "trackio", *[STEP] * 5)
    assert notes == ["tracker   trackio: the server is gone; the training goes on without it"]
    assert len(count) == 1


@pytest.mark.parametrize("slow", ["init", "log"])
def test_a_tracker_that_hangs_holds_nobody_up_for_long(library, run, monkeypatch, slow):
    fake = library("trackio")
    setattr(fake, slow, lambda *_, **__: time.sleep(5))
    monkeypatch.setattr(trackers, "_BEGIN", 0.1)
    monkeypatch.setattr(trackers, "_END", 0.1)
    begin = time.monotonic()
    notes = told(run, "trackio", *[STEP] * 100)
    assert time.monotonic() - begin < 3
    assert notes[-1] == "tracker   trackio has not taken everything in 0.1 s; the rest is left out"


def test_what_a_library_prints_is_not_a_result(library, run, capsys):
    library("trackio")
    told(run, "trackio")
    assert capsys.readouterr().out == ""


def test_what_is_not_installed_is_refused_before_anything_is_read(make_recipe, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    recipe = make_recipe(model={"name_or_path": "/nowhere"}, training={"report_to": ["tensorboard", "wandb", "mlflow"]})
    with pytest.raises(
        InputError, match=r"report_to: wandb and mlflow not installed.*pip install 'wandb[<>=.,\d]+' 'mlflow[<>=.,\d]+'"
    ):
        train(recipe)
    assert not RunDir(recipe.output_dir).path.exists()


def test_a_training_is_the_same_with_a_tracker_and_tensorboard_has_load_and_norms(
    library, make_recipe, unplanned, tmp_path
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fake = library("trackio")
    settings = {"max_steps": 3, "save_steps": 3}
    plain = train(make_recipe(training=settings | {"report_to": "none"}, output_dir=str(tmp_path / "plain")))
    both = train(
        make_recipe(training=settings | {"report_to": ["tensorboard", "trackio"]}, output_dir=str(tmp_path / "both"))
    )
    losses = [[line.loss for line in record.read(one) if isinstance(line, Step)] for one in (plain, both)]
    assert losses[0] == losses[1] == [values["train/loss"] for values in of(fake, "log") if "train/loss" in values]
    assert not plain.tensorboard.exists()
    board = EventAccumulator(str(both.tensorboard)).Reload()
    tags = board.Tags()["scalars"]
    assert {"loss", "eval_loss", "system/cpu_use", "system/system_memory_bytes"} <= set(tags)
    (norm,) = board.Scalars("adapter_norm/layer_01")
    assert norm.step == 3
    from qlora.jobs.reporting.adapter_norms import norms

    saved = norms(both.adapter)
    whole = sum(row[saved["layers"].index(1)] ** 2 for row in saved["modules"].values()) ** 0.5
    assert norm.value == pytest.approx(whole, rel=1e-2)  # the checkpoint is in float32, the adapter in bfloat16
    (config,) = of(fake, "config")
    assert config["lora.r"] == 4
    assert json.loads(both.trackers_file.read_text()) == {"trackio": of(fake, "init")[0]["name"]}


@pytest.mark.filterwarnings("ignore")  # of libraries about each other
@pytest.mark.parametrize("name", STAND_INS)
def test_the_library_itself_takes_it(run, name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    notes = told(run, name, Evaluation(1, 0.5, 2.0, 3.0))
    assert not [note for note in notes if "goes on without it" in note]
    assert trackers.known_ids(run).keys() == {name}


def test_an_interruption_while_a_tracker_begins_is_not_hidden_by_the_next_that_never_did(tmp_path, monkeypatch):
    class Kind:
        name, id = "a tracker", None

        def __init__(self, *_):
            pass

        def begin(self, identity):
            pass

        def end(self, failed):
            assert failed

    def interrupted(tracker):
        tracker.thread.start()
        raise KeyboardInterrupt

    monkeypatch.setattr(trackers, "_KINDS", {"wandb": Kind, "mlflow": Kind})
    monkeypatch.setattr(trackers.Tracker, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt), trackers.tracked(RunDir(tmp_path), ["wandb", "mlflow"], {}):
        pass


def test_each_tracker_of_the_recipe_has_a_kind():
    annotation = Training.model_fields["report_to"].annotation
    assert {*get_args(get_args(annotation)[0])} == {"tensorboard", *trackers._KINDS}
