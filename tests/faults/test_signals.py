"""SIGINT, SIGTERM, SIGHUP, SIGKILL and closed pipes, wherever a command is, the loop of the training apart."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora.commands.train import train
from qlora.recipe import Recipe
from qlora.system import signals
from qlora.system.errors import InputError, Interrupted
from qlora.system.storage import alone, new_folder
from tests import forked
from tests.conftest import CONVERSATIONS, messages, write_jsonl

TERM, INT, KILL, HUP, NONE = signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGHUP, 0

STOPPED = "{verb} interrupted; no partial output was left"
LOST = "export interrupted; nothing was left at out"
KEPT = "export interrupted; the model in out is complete"
# tokenize by several processes, though the file is small
WORKERS = {"qlora.data.tokenized:_POOL_FROM": 0, "qlora.data.tokenized:CHUNK": 2}
CONVERTER = "import time\nprint('converting', flush=True)\ntime.sleep(300)\n"

# name -> (arguments, signals, exit code, the last line, what else the case needs)
STOPS = {
    "plan, reading the config": ("plan RECIPE", [("qlora.base_model:load_config", TERM)], 143, STOPPED),
    "plan, going through the model": ("plan RECIPE", [("qlora.planner:outline", INT)], 130, STOPPED),
    "data, tokenizing": ("data RECIPE", [("qlora.data.supervised:encode", INT)], 130, STOPPED),
    "data, tokenizing in processes": (
        "data RECIPE", [("qlora.data.tally:Tally.add", TERM)], 143, STOPPED, {"set": WORKERS}
    ),
    "data, starting processes": (
        "data RECIPE data.num_proc=2",
        [("concurrent.futures.process:ProcessPoolExecutor.submit", INT)],
        130,
        STOPPED,
        {"set": WORKERS},
    ),
    "data, twice": (
        "data RECIPE",
        [("qlora.data.tally:Tally.add", INT), ("concurrent.futures.process:ProcessPoolExecutor.shutdown", INT)],
        130, None, {"set": WORKERS},
    ),
    "data, killed": ("data RECIPE", [("qlora.data.tally:Tally.add", KILL)], -9, None, {"set": WORKERS}),
    "train, tokenizing": (
        "train RECIPE", [("qlora.data.tally:Tally.add", TERM)], 143, "stopped before the first step", {"set": WORKERS}
    ),
    "train, rehearsing": (
        "train RECIPE", [("qlora.training.rehearsal:held_later", TERM)], 143, "stopped before the first step"
    ),
    "eval, loading": ("eval run", [("qlora.base_model:load", TERM)], 143, STOPPED),
    "eval, loading the adapter": ("eval run", [("qlora.methods:load", INT)], 130, STOPPED),
    "eval, the loss": ("eval run", [("qlora.evaluation.metrics:losses", INT)], 130, STOPPED),
    "eval, answering": ("eval run", [("qlora.evaluation.generate:_generate", TERM)], 143, STOPPED),
    "eval, writing": ("eval run", [("qlora.commands.eval:write_together", TERM)], 143, STOPPED),
    "chat, loading": ("chat run --prompt x", [("qlora.base_model:load", INT)], 130, STOPPED),
    "chat, answering": (
        "chat run --prompt x --max-new-tokens 4", [("qlora.evaluation.generate:_until_stop", TERM)], 143, STOPPED
    ),
    "adapters": ("adapters .", [("qlora.runs.listing:_entry", TERM)], 143, STOPPED),
    "export, planning": ("export run --out out", [("qlora.exporter.merge:plan", INT)], 130, LOST),
    "export, merging": ("export run --out out", [("qlora.exporter.merge:Merge._matrix", TERM)], 143, LOST),
    "export, writing": ("export run --out out", [("qlora.exporter.writer:_write_tensor", INT)], 130, LOST),
    "export, the configs": ("export run --out out", [("qlora.exporter.configs:write", TERM)], 143, LOST),
    "export, the proof": ("export run --out out", [("qlora.exporter.proof:Live.compare", INT)], 130, LOST),
    "export, the other base": (
        "export run --out out --compare-bases", [("qlora.jobs.exporting.export_proof:Prover.compare", TERM)], 143, LOST
    ),
    "export, the card": ("export run export.verify=off --out out", [("qlora.jobs.exporting.export_folder:card", INT)], 130, LOST),
    "export, before the rename": ("export run export.verify=off --out out", [("os:rename", TERM)], 143, LOST),
    "export, after the rename": (
        "export run export.verify=off --out out", [("os:rename", NONE), ("qlora.system.storage:fsync", TERM)], 143, KEPT
    ),
    "export, llama.cpp's converter": (
        "export run export.verify=off --out out --gguf f16", [("subprocess:Popen.communicate", TERM)], 143, LOST,
        {"environ": {"LLAMA_CPP": "llama.cpp"}},
    ),
    "export, llama.cpp's converter, twice": (
        "export run export.verify=off --out out --gguf f16",
        [("subprocess:Popen.communicate", TERM), ("subprocess:Popen.kill", TERM)],
        143, None, {"environ": {"LLAMA_CPP": "llama.cpp"}},
    ),
    "export, twice": (
        "export run export.verify=off --out out",
        [("qlora.jobs.exporting.export_folder:card", INT), ("shutil:rmtree", INT)],
        130,
        None,
    ),
    "export, killed before the rename": ("export run export.verify=off --out out", [("os:rename", KILL)], -9, None),
    "export, a terminal that is closed": ("export run --out out", [("qlora.jobs.exporting.export_folder:card", HUP)], 0, None),
    "eval, nobody reads": ("eval run", [], 0, None, {"closed": True}),
    "data, nobody reads": ("data RECIPE", [], 0, None, {"closed": True}),
}  # fmt: skip

# what else may be there afterwards
LEAVES = {
    "export, after the rename": {"out"},
    "export, twice": {"out.partial", "out.partial.lock"},
    "export, llama.cpp's converter, twice": {"out.partial", "out.partial.lock"},
    "export, killed before the rename": {"out.partial", "out.partial.lock"},
    "export, a terminal that is closed": {"out"},
}


# more places of what the others have
LATE = {
    "data, twice", "train, tokenizing", "eval, loading the adapter", "eval, the loss", "chat, loading", "export, planning",
    "export, the configs", "export, the other base", "export, the card", "export, llama.cpp's converter, twice",
    "export, a terminal that is closed",
}  # fmt: skip
TIERS = {"quick": STOPS.keys() - LATE, "slow": LATE}
CASES = [
    pytest.param(tier, name, marks=pytest.mark.slow if tier == "slow" else (), id=name)
    for tier, names in TIERS.items()
    for name in STOPS
    if name in names
]


@pytest.fixture(scope="module")
def results_of(tmp_path_factory, tiny_model):
    """Return results_of(tier) -> {name: {"code", "said", "alive", "there"}} of its STOPS, all stopped once."""
    return functools.cache(lambda tier: stopped(tier, tmp_path_factory, tiny_model))


def stopped(tier, tmp_path_factory, tiny_model):
    """Return the results of a tier's STOPS, each in a folder of its own with a finished run."""
    stops = {name: STOPS[name] for name in STOPS if name in TIERS[tier]}
    root = tmp_path_factory.mktemp("stops")
    values = {
        "model": {"name_or_path": str(tiny_model("llama"))},
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"train": "rows.jsonl", "max_length": 128, "eval_fraction": 0.25},
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "warmup_ratio": 0.0,
        },
        "output_dir": "run",
    }
    rows = [{"messages": messages(turns)} for turns in CONVERSATIONS]
    cases = []
    for name, (argv, sent, _, _, *more) in stops.items():
        folder = root / name
        folder.mkdir()
        write_jsonl(folder / "rows.jsonl", rows)
        values["output_dir"] = "run" if argv.startswith(("eval", "chat", "export", "adapters")) else "new"
        (folder / "recipe.yaml").write_text(Recipe.from_dict(values).to_yaml())
        (folder / "llama.cpp").mkdir()
        (folder / "llama.cpp" / "convert_hf_to_gguf.py").write_text(CONVERTER)
        extra = dict(*more)
        extra["environ"] = {"QLORA_CACHE": str(folder / "cache")} | extra.get("environ", {})
        case = {"argv": argv.replace("RECIPE", "recipe.yaml").split(), "signals": sent, "folder": str(folder), **extra}
        cases.append(case)
    before, trained = Path.cwd(), root / "trained"
    trained.mkdir()
    (trained / "recipe.yaml").write_text(Recipe.from_dict(values | {"output_dir": "run"}).to_yaml())
    write_jsonl(trained / "rows.jsonl", rows)
    os.chdir(trained)
    try:
        train(Recipe.load("recipe.yaml"))
    finally:
        os.chdir(before)
    for case in cases:
        if "run" in case["argv"]:
            shutil.copytree(trained / "run", Path(case["folder"]) / "run")
    script = Path(__file__).with_name("stopped.py")
    done = forked.run(script, stdin=json.dumps(cases))
    assert done.returncode == 0, done.stderr
    found = dict(zip(stops, json.loads(done.stdout), strict=True))
    return {name: one | {"folder": root / name} for name, one in found.items()}


@pytest.mark.parametrize(("tier", "name"), CASES)
def test_a_signal_ends_a_command_with_its_code_one_line_and_nothing_half_done(results_of, tier, name):
    argv, _, code, line, *_ = STOPS[name]
    found = results_of(tier)[name]
    assert found["code"] == code, found["said"]
    assert "Traceback" not in found["said"]
    assert "Exception ignored" not in found["said"]
    if line is not None:
        assert found["said"].splitlines()[-1] == f"qlora: {line.format(verb=argv.split()[0])}"
        assert found["said"].count("qlora: ") == 1
    assert found["alive"] == []
    folder, there = found["folder"], {"rows.jsonl", "recipe.yaml", "llama.cpp", "cache"}
    there |= {"run"} if "run" in argv else set()
    assert {path.name for path in folder.iterdir()} - there == LEAVES.get(name, set())
    assert not list((folder / "run").glob("*.partial"))
    assert (folder / "run" / "eval.json").exists() == (name == "eval, nobody reads")
    if (folder / "out").exists():
        report = json.loads((folder / "out" / "export_report.json").read_text())
        assert report["verified"] == ("export.verify=off" not in argv)
        assert (folder / "out" / "README.md").exists()
    if code != -9 and not name.endswith("twice"):  # rows are tokenized whole, or not kept
        for kept in (folder / "cache" / "tokenized").glob("*"):
            assert (kept / "summary.json").exists(), kept


@pytest.mark.slow
def test_a_pipe_that_is_closed_does_not_make_a_command_fail(results_of):
    folder = results_of("quick")["data, nobody reads"]["folder"]
    command = f"{sys.executable} -m qlora data recipe.yaml | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[0].startswith("lengths ")
    assert done.stdout.splitlines()[1:] == ["0"]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_signal_that_comes_where_python_drops_exceptions_comes_again():
    class Dropped:
        def __del__(self):
            os.kill(os.getpid(), TERM)
            time.sleep(0)

    def drop():
        Dropped()
        time.sleep(5)

    with pytest.raises(Interrupted) as stopped, signals.handled():
        drop()
    assert stopped.value.exit_code == 143


def test_a_signal_that_comes_again_before_python_is_done_dropping_it_is_not_lost(monkeypatch):
    """Under load a timer may be faster than the start of its thread."""
    real, early = signals._send_later, []

    def send(number):
        if not early:
            early.append(number)
            os.kill(os.getpid(), number)  # at once, within Python's hook
            time.sleep(0)
        else:
            real(number)

    monkeypatch.setattr(signals, "_send_later", send)

    class Dropped:
        def __del__(self):
            os.kill(os.getpid(), TERM)
            time.sleep(0)

    def drop():
        Dropped()
        time.sleep(5)

    with pytest.raises(Interrupted) as stopped, signals.handled():
        drop()
    assert stopped.value.exit_code == 143
    assert early == [TERM]


@pytest.mark.parametrize("number", [INT, TERM])
def test_in_a_program_of_somebody_else_a_second_signal_does_what_it_did_before(monkeypatch, number):
    """A notebook, interrupted twice, lives on, and so does what it began; the command line ends, as above."""
    came = []
    monkeypatch.setattr(signals, "_leave", lambda code: pytest.fail("the program was ended"))
    before = signal.signal(number, lambda number, frame: came.append(number))
    try:
        with signals.noted() as stop:
            os.kill(os.getpid(), number)
            assert (stop.number, came) == (number, [])
            os.kill(os.getpid(), number)
            assert came == [number]
        os.kill(os.getpid(), number)
        assert came == [number] * 2
    finally:
        signal.signal(number, before)


# ---- two at once -----------------------------------------------------------------------------------------------------


def test_two_exports_do_not_share_a_folder_and_a_killed_one_leaves_no_lock(tmp_path):
    out, (reading, writing) = tmp_path / "models" / "out", os.pipe()
    pid = os.fork()
    if pid == 0:
        with alone(out, "export"), new_folder(out):
            os.write(writing, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    with (
        pytest.raises(InputError, match=f"out is in use by process {pid}; wait for it, or choose"),
        alone(out, "export"),
    ):
        pass
    assert (tmp_path / "models" / "out.partial").exists()  # it is at work
    os.kill(pid, KILL)
    os.waitpid(pid, 0)
    with alone(out, "export"), new_folder(out) as folder:
        (folder / "file").write_text("x")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(InputError, match="out is not empty"), alone(out, "export"):
        pass
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_of_many_that_begin_together_one_has_the_folder(tmp_path):
    """Each takes the lock, and removes it; never are two at work."""
    out, mark = tmp_path / "out", tmp_path / "mark"
    pids = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            code = 0
            for _ in range(200):
                try:
                    with alone(out, "export"):
                        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # nobody else is here
                        mark.unlink()
                except InputError:
                    pass
                except BaseException:
                    code = 1
            os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert not list(tmp_path.iterdir())
