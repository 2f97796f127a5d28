"""Nothing leaves the machine unless asked: no verb, and nothing that a verb starts, looks up or connects to another machine."""

import importlib.util
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.recipe import as_yaml
from tests.commands.test_judge import prefers, serving
from tests.conftest import CONVERSATIONS, messages, write_jsonl

# what every Python of a test begins with, those that a verb starts too: whoever connects to another machine, asks for its
# address or listens to others is written down and ended. Python tells of each socket of its own code and of C code in it
WATCH = """
import os, sys

def local(host):
    if isinstance(host, bytes):
        host = os.fsdecode(host)
    here = ("", "127.0.0.1", "::1", "localhost", os.environ["MAY_LOOK_UP"])
    return not isinstance(host, str) or host in here or os.sep in host

def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        place = arguments[1]
        host = place[0] if isinstance(place, tuple) else place if isinstance(place, (str, bytes)) else None
        here = local(host) and (host != "" or event != "socket.bind")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"):
        place = arguments[0]
        here = local(place[0] if isinstance(place, tuple) else place)
    else:
        return
    if not here:
        with open(os.environ["SEEN_OUTSIDE"], "a") as file:
            file.write(f"OUTSIDE {event} {place} by {sys.argv}\\n")
        os._exit(99)

sys.addaudithook(watch)
"""


@pytest.fixture
def watched(tmp_path):
    """Return run(code, *arguments) -> (exit code, stderr, what was seen) of Python `code` in a process of a user who has set
    nothing, and of the processes that this starts."""
    folder, seen = tmp_path / "watch", tmp_path / "seen.txt"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCH)

    def run(*command, may_look_up="127.0.0.1", **more):
        ours = (
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_HUB_DISABLE_TELEMETRY",
            "DO_NOT_TRACK",
            "DISABLE_TELEMETRY",
        )
        surroundings = {name: value for name, value in os.environ.items() if name not in ours}
        path = os.pathsep.join(
            filter(None, (str(folder), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
        )
        surroundings |= {"PYTHONPATH": path, "SEEN_OUTSIDE": str(seen), "MAY_LOOK_UP": may_look_up}
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=500, **more)
        return done.returncode, done.stderr, seen.read_text() if seen.exists() else ""

    return run


JOB = """
import sys
import {first}
import {then}
from qlora import Recipe, chat, evaluate, export, train
recipe, out = sys.argv[1:]
run = train(Recipe.load(recipe, ["training.max_steps=2", "data.eval_fraction=0.2"]))
evaluate(run.path)
export(run.path, out)
chat(out, "Hello there")
import threading, time
time.sleep(0.5)  # what is sent by a thread
"""


def test_train_eval_export_and_chat_reach_no_other_machine(make_recipe, tmp_path, watched):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe().to_yaml())
    # in the order that is hardest: the hub's library has read the environment before qlora can set it
    code, said, seen = watched(
        "-c", JOB.format(first="huggingface_hub.constants", then="qlora"), recipe, tmp_path / "out"
    )
    assert (code, seen) == (0, ""), said
    assert len(json.loads((tmp_path / "out" / "export_report.json").read_text())["modules"]) > 0


VERBS = """
init --model MODEL --data rows.jsonl --card 4090 --goal quality --out made.yaml
recipes
recipes show quickstart
doctor .
plan sft.yaml
plan sft.yaml --methods --vram 24GiB
plan sft.yaml --processes 2 --vram 24GiB
plan sft.yaml --plot memory.png
plan --card list
data sft.yaml --html rows.html
train sft.yaml
train dpo.yaml
train kto.yaml
train orpo.yaml
train classes.yaml
eval sft --latency --forgetting built-in --max-rows 2
eval dpo --max-rows 2
eval classes
eval sft --judge JUDGE --judge-model judge-1
eval MODEL --data rows.jsonl --max-rows 2
export sft --out merged
export sft --out sft.gguf --gguf adapter
export sft --out int8 --int8
compare sft dpo
compare sft --served --form adapter --max-rows 2
compare comparison.yaml
chat sft --prompt Hello --max-new-tokens 4
adapters .
report sft dpo --out page.html
push sft me/mine --base me/base --dry-run
"""
NEEDS = {"--plot": "matplotlib", "--int8": "torchao", "--judge": "openai"}

# one process for all: importing the libraries takes longer than the rest. Their threads have a second to send something
RUN_ALL = """
import json, sys, time
from pathlib import Path
from qlora import cli, planner
from tests import outlines
planner.outline = outlines.kept(planner.outline, Path(sys.argv[1]))
for argv in json.loads(sys.argv[2]):
    sys.argv = ["qlora", *argv]
    try:
        cli.app(argv, standalone_mode=False)
    except BaseException as error:
        print(f"FAILED {argv}: {error!r}", file=sys.stderr)
import qlora
with qlora.open("sft") as model:
    model.answer("What can you do?", max_new_tokens=4)
time.sleep(1)
"""


@pytest.fixture
def everything(make_recipe, classify_recipe, tmp_path):
    """Return a folder with a recipe of each objective, and a comparison, that train a tiny model for two steps."""
    folder = tmp_path / "all"
    folder.mkdir()
    rows = write_jsonl(folder / "rows.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS])
    said = [
        {"prompt": turns[0][1], "completion": turns[1][1], "label": n % 2 == 0} for n, turns in enumerate(CONVERSATIONS)
    ]
    pairs = [{"prompt": turns[0][1], "chosen": turns[1][1], "rejected": "No idea."} for turns in CONVERSATIONS]
    of = {
        "sft": rows,
        "dpo": write_jsonl(folder / "pairs.jsonl", pairs),
        "orpo": folder / "pairs.jsonl",
        "kto": write_jsonl(folder / "verdicts.jsonl", said),
    }
    for name, file in of.items():
        sections = {"data": {"train": str(file)}, "output_dir": name, **({} if name == "sft" else {name: {}})}
        (folder / f"{name}.yaml").write_text(make_recipe(**sections).to_yaml())
    (folder / "classes.yaml").write_text(classify_recipe(output_dir="classes").to_yaml())
    values = {"base": "sft.yaml", "variants": {"a": {}}, "max_rows": 2, "output_dir": "compared"}
    (folder / "comparison.yaml").write_text(as_yaml(values))
    return folder


@pytest.mark.slow
def test_no_verb_reaches_another_machine(everything, watched, tiny_model, tmp_path):
    lines = VERBS.strip().splitlines()
    there = [line for line in lines if all(flag not in line or importlib.util.find_spec(NEEDS[flag]) for flag in NEEDS)]
    with serving(prefers(len)) as (url, requests):
        argv = [shlex.split(line.replace("MODEL", str(tiny_model())).replace("JUDGE", url)) for line in there]
        code, said, seen = watched("-c", RUN_ALL, tmp_path, json.dumps(argv), cwd=everything)
    assert seen == ""
    assert code == 0, said
    assert "FAILED" not in said
    assert requests
    rows = json.loads((everything / "compared" / "comparison.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["done"]  # in processes of its own


def test_every_verb_is_in_that_list():
    from qlora import cli

    names = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert {line.split()[0] for line in VERBS.strip().splitlines()} == names


@pytest.mark.slow
def test_two_processes_reach_no_other_machine(everything, watched):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    name = socket.gethostname()  # torchrun looks up its own
    code, said, seen = watched(*launcher, "-m", "qlora", "train", "sft.yaml", cwd=everything, may_look_up=name)
    assert (code, seen) == (0, ""), said


def test_the_check_sees_what_trl_would_send(watched):
    """Two-sided: with telemetry on, the same check ends the process."""
    code, said, seen = watched(
        "-c",
        """
import huggingface_hub.utils, huggingface_hub.constants
huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = False
huggingface_hub.utils.send_telemetry("trl/train", library_name="trl", library_version="1.16")
import time
time.sleep(20)
""",
    )
    assert code == 99, said
    assert "OUTSIDE socket." in seen


@pytest.mark.parametrize(
    "does",
    [
        "s.connect(('192.0.2.1', 80))",
        "s.bind(('0.0.0.0', 0))",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        "socket.gethostbyname('example.invalid')",
        "import subprocess; sys.exit(subprocess.call([sys.executable, '-c', 'import socket; socket.getfqdn(\\'192.0.2.1\\')']))",
    ],
)
def test_the_check_sees_addresses_listeners_and_processes(watched, does):
    code, said, seen = watched("-c", f"import socket, sys; s = socket.socket(); {does}")
    assert code == 99, said
    assert seen.startswith("OUTSIDE socket.")
