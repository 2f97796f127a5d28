"""What is around a process: folders, names, limits, locale, clock, network, terminal. What cannot be is one message."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.open import open as opened
from qlora.commands.train import train
from qlora.jobs.opening.prepared_data import prepare
from qlora.jobs.planning.planned_training import plan_training
from qlora.recipe import Recipe
from qlora.runs.record import Begun
from qlora.system.errors import DoesNotFit, InputError
from qlora.system.events import heard_by
from tests.conftest import CONVERSATIONS, messages, some_slow, write_jsonl

ODD = 'ein "Ordner" für \'s\nübrige -- ü ✓'  # of a folder: spaces, quotes, a line's end, and not in ASCII
SHELL = """
ulimit -n 64; umask 077
trap '' PIPE
exec <&-
exec "$@"
"""


@pytest.fixture
def tiny(tiny_model, tmp_path):
    """Return tiny(folder) -> a recipe file in `folder`, whose model, data and output are all named by relative paths."""

    def tiny(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tiny_model("llama"), folder / "mödel")
        write_jsonl(folder / "dätä ✓.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS])
        values = {
            "model": {"name_or_path": "./mödel"},
            "lora": {"r": 4, "lora_alpha": 8},
            "data": {"train": "dätä ✓.jsonl", "max_length": 128, "eval_fraction": 0.25},
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
                         "learning_rate": 1e-2, "warmup_ratio": 0.0},
            "output_dir": "läuft",
        }  # fmt: skip
        file = folder / "-rezept ✓.yaml"
        file.write_text(Recipe.from_dict(values).to_yaml(), encoding="utf-8")
        return file

    return tiny


def permitted(command):
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
def test_in_hard_surroundings_the_bits_are_the_same(tiny, tmp_path, monkeypatch):
    """No home, no temporary folder, no network, no GPU, 64 files, ASCII, a terminal of 20 columns, odd names: all at once."""
    recipe = tiny(tmp_path / ODD)
    broken = tmp_path / "a file"
    broken.write_text("")
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "QLORA_", "XDG_", "LC_"))
    }
    environ |= {"HOME": str(broken), "XDG_CACHE_HOME": "", "TMPDIR": str(broken / "none"), "LANG": "C", "LC_ALL": "POSIX",
                "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "20", "TERM": "dumb",
                "NO_COLOR": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}  # fmt: skip
    command = ["bash", "-c", SHELL, "bash", sys.executable, "-m", "qlora"]
    if permitted(["unshare", "-rn", "true"]):  # a network of its own, in which nothing is
        command = ["unshare", "-rn", *command]
    command += ["train", "--", recipe.name]
    done = subprocess.run(command, cwd=recipe.parent, env=environ, capture_output=True, timeout=200)
    said = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 0, said
    assert "Traceback" not in said
    assert "adapter in läuft/adapter" in said
    # what was made is the user's alone, as the umask says
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (recipe.parent / "läuft").rglob("*")}
    assert len(modes) > 10
    assert {path.name: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}

    monkeypatch.chdir(recipe.parent)
    run = train(Recipe.load(recipe.name, ["output_dir=run"]))
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run.path, Path("läuft")))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert export("läuft", "-fertig ✓")["verified"]


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = {
    "bfloat16 as the default": lambda: default_dtype(torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("around", some_slow(AROUND, but=["bfloat16 as the default"]))
def test_what_a_program_has_set_of_torch_changes_no_bit(make_recipe, trained_once, unplanned, around):
    with AROUND[around]():
        trained = train(make_recipe())
        answers = []
        with opened(trained.path) as model:
            answers += model.answers(["What is 1 plus 2?"], max_new_tokens=8)
        score = evaluate(trained.path, max_rows=2)
        assert torch.get_default_dtype() == (torch.bfloat16 if around.startswith("bfloat16") else torch.float32)
    usual = trained_once()
    ours, expected = (load_file(run.adapter / "adapter_model.safetensors") for run in (trained, usual))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    with opened(usual.path) as model:
        assert model.answers(["What is 1 plus 2?"], max_new_tokens=8) == answers
    assert evaluate(trained.path, max_rows=2)["loss"] == score["loss"]


def test_a_second_thread_cannot_change_what_a_training_computes_in(make_recipe, trained_once, unplanned, tmp_path):
    usual, refused = trained_once(), []

    def go_on_beside(model):
        beside = [
            lambda: train(make_recipe(output_dir=str(tmp_path / "other"))),
            lambda: opened(usual.path),
            lambda: model.answer("What is 1 plus 2?", max_new_tokens=2),
        ]
        for action in beside:
            with pytest.raises(InputError, match="another thread of this process is at work"):
                action()
            refused.append(action)

    def hear(event):
        if isinstance(event, Begun):
            other = threading.Thread(target=go_on_beside, args=(model,))
            other.start()
            other.join()

    with opened(usual.path) as model, heard_by(hear):
        trained = train(make_recipe())
    assert len(refused) == 3
    assert not (tmp_path / "other").exists()
    ours, expected = (load_file(run.adapter / "adapter_model.safetensors") for run in (trained, usual))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert train(make_recipe(output_dir=str(tmp_path / "other"))).adapter.is_dir()  # once it has ended


def test_what_others_may_read_is_what_the_umask_says(tiny, tmp_path, monkeypatch):
    recipe = tiny(tmp_path / "x")
    monkeypatch.chdir(recipe.parent)
    before = os.umask(0o022)
    try:
        train(Recipe.load(recipe.name))
        export("läuft", "out")
    finally:
        os.umask(before)
    files = [path for folder in ("läuft", "out") for path in Path(folder).rglob("*") if path.is_file()]
    assert len(files) > 20
    assert {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in files
            if stat.S_IMODE(path.stat().st_mode) != 0o644} == {}  # fmt: skip


def test_a_local_model_never_touches_the_network(make_recipe, tmp_path, monkeypatch):
    asked = []  # a library may swallow the error, and go on with what is here

    def no(*args, **kwargs):
        asked.append("".join(traceback.format_stack(limit=12)))
        raise OSError(errno.ENETUNREACH, "the network was used")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for place, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (socket, "create_connection")):
        monkeypatch.setattr(place, name, no)
    run = train(make_recipe())
    evaluate(run.path, max_rows=2)
    export(run.path, tmp_path / "out")
    assert asked == [], asked[0]
    with pytest.raises(InputError, match="no such folder, and the hub says"):  # else nothing is tested
        train(make_recipe(model={"name_or_path": "owner/name"}, output_dir=str(tmp_path / "other")))
    assert asked


def test_a_hub_name_without_a_network_is_an_error_soon(make_recipe, monkeypatch):
    def no(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no)
    monkeypatch.setattr(socket.socket, "connect", no)
    begin = time.monotonic()
    with pytest.raises(InputError, match="owner/name: no such folder, and the hub says: "):
        train(make_recipe(model={"name_or_path": "owner/name"}))
    assert time.monotonic() - begin < 60


def test_a_clock_that_jumps_changes_no_number_that_is_shown(make_recipe, tmp_path, monkeypatch, capsys):
    """The time of day goes back an hour, on a day, and back; files are of the next century."""
    recipe = make_recipe(training={"max_steps": 3, "save_steps": 1, "eval_steps": 1})
    for path in [Path(recipe.data.train[0].path), *Path(recipe.model.name_or_path).iterdir()]:
        os.utime(path, (4e9, 4e9))
    jumps, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + jumps.choice([-3600, 0, 86400, -1e6]))
    run = train(recipe)
    evaluate(run.path, max_rows=2)
    export(run.path, tmp_path / "out")
    records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    times = [record["time"] for record in records]
    assert times == sorted(times)
    assert 0 < times[0] <= times[-1] < 300
    assert all(0 < record["tokens_per_second"] < 1e7 for record in records if "loss" in record)
    assert 0 < json.loads((tmp_path / "out" / "export_report.json").read_text())["seconds"] < 300
    shown = capsys.readouterr()
    # no time and no speed below zero; what training has changed is below zero of right
    assert not re.search(r"-\d+(m|s)\b|-[\d,.]+ (s|tokens)\b", shown.out + shown.err)
    assert not re.search(r"-\d+\.", shown.err)


# ---- places that cannot be written -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """A finished run on the tiny Llama; made once, do not write to it."""
    folder = tmp_path_factory.mktemp("surrounded")
    rows = write_jsonl(folder / "train.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS])
    values = {
        "model": {"name_or_path": str(tiny_model("llama"))},
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"train": str(rows), "max_length": 128, "eval_fraction": 0.25},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        "output_dir": str(folder / "run"),
    }
    return train(Recipe.from_dict(values))


@pytest.fixture
def read_only(tmp_path):
    """A folder that root cannot write to either."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if not permitted(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder]):
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_read_only_place_is_refused(run, make_recipe, read_only, monkeypatch):
    from qlora import base_model

    with pytest.raises(
        InputError, match=r"out: Read-only file system; choose another folder|, 0 B are free on that disk"
    ):
        export(run.path, read_only / "out")
    monkeypatch.setattr(base_model, "load", None)  # it is found before
    with pytest.raises(InputError, match=r"output_dir .*run: Read-only file system; choose another folder"):
        train(make_recipe(output_dir=str(read_only / "run")))


OUTS = {
    "a file": ("file", "file is a file; choose another folder"),
    "in a file": ("file/out", "file is a file; choose another folder"),
    "a folder that is used": ("used", "used is not empty; export never overwrites"),
    "a link": ("link", "link is a symbolic link to empty"),
    "the run": ("run", "run is not empty"),
    "the adapter": ("run/adapter", "adapter is not empty"),
    "in the adapter": ("run/adapter/out", r"adapter/out is inside .*adapter, which is an input"),
    "in the base": ("BASE/out", r"out is inside .*, which is an input"),
    "the base": ("BASE", "is not empty"),
    "this folder": (".", "is not empty"),
    "nothing": ("", "is not empty"),
    "the root": ("/", "/ is not empty"),
    "a device": ("/dev/null", "/dev/null is a file"),
}


@pytest.mark.parametrize("what", OUTS)
def test_an_output_that_cannot_be_is_refused_and_nothing_changes(run, tmp_path, monkeypatch, what):
    out, expected = OUTS[what]
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    base = run.recipe().model.name_or_path
    before = contents(tmp_path) | contents(Path(base))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=expected):
        export("run", out.replace("BASE", base))
    assert contents(tmp_path) | contents(Path(base)) == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "file", "used", "empty", "link"}


def qlora(arguments, cwd, before=""):
    """Return what came of the command line in a fork of this process, in which `before` has run: (code, stderr)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.chdir(cwd)
            os.dup2(writing, 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            from qlora import cli

            exec(before)
            sys.argv = ["qlora", *arguments]
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with open(reading, errors="replace") as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


LONG = "n" * 300
GONE = "import shutil; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')"
FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
NONE_LEFT = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))"

LIMITS = {
    "a long name of an export": (["export", "RUN", "--out", LONG], "", "n: File name too long; choose a shorter name"),
    "a long name of a run": (["train", "RECIPE", f"output_dir={LONG}"], "", "File name too long; choose a shorter name"),
    "a folder that is gone": (["eval", "RUN"], GONE, "the current directory: No such file or directory; cd to"),
    "a limit on files": (["export", "RUN", "--out", "out"], FILES, "out.partial/model.safetensors: File too large"),
    "no more files may be open": (["plan", "RECIPE"], NONE_LEFT, "Too many open files"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("what", LIMITS)
def test_what_the_system_refuses_is_one_message(run, tmp_path, what):
    arguments, before, expected = LIMITS[what]
    names = {"RUN": str(run.path), "RECIPE": str(run.recipe_file)}
    code, said = qlora([names.get(argument, argument) for argument in arguments], tmp_path, before)
    assert code == 2, said
    assert expected in said
    assert said.splitlines()[-1].startswith("qlora: "), said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("[!g]*"))


def test_text_that_the_terminal_cannot_show_is_shown_otherwise_and_json_is_json(tiny, tmp_path):
    recipe = tiny(tmp_path / "x")
    ascii_only = "sys.stdout, sys.stderr = open('out.json', 'w', encoding='ascii'), open(2, 'w', encoding='ascii', closefd=False)"
    code, said = qlora(["data", "--json", "--", recipe.name], recipe.parent, ascii_only)
    assert code == 0, said
    assert json.loads((recipe.parent / "out.json").read_bytes())["sources"][0]["path"] == "dätä ✓.jsonl"
    assert r"data      d\xe4t\xe4 \u2713.jsonl: 24 rows" in said


# ---- a GPU that is not there for us ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "says"), [(2**18, True), (24 * 2**30 - 600 * 2**20, False)])
def test_a_gpu_that_others_fill_is_said_to_be_filled(make_recipe, monkeypatch, free, says):
    """The card is played: there is none here. What it is asked is torch.cuda.mem_get_info."""
    recipe = make_recipe(data={"max_length": 512})
    ready = prepare(recipe)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 24 * 2**30))
    if not says:
        assert plan_training(ready, torch.device("cuda")).predicted_bytes > 0
        return
    with pytest.raises(DoesNotFit, match=r"512 MiB are free") as refused:
        plan_training(ready, torch.device("cuda"))
    assert "other processes hold 23.50 GiB of the GPU; nvidia-smi lists them" in str(refused.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_that_another_process_fills_is_refused_before_the_model_is_loaded(make_recipe, monkeypatch):
    code = (
        "import torch, sys; free, _ = torch.cuda.mem_get_info()\n"
        "held = torch.empty(free - 2**28, dtype=torch.uint8, device='cuda'); print(1, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(DoesNotFit, match=r"are free|requested"):
            train(make_recipe())
    finally:
        other.communicate()
