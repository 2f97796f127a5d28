"""Nothing leaves the machine unless asked: no socket is opened to the outside by a local job."""

import json
import os
import subprocess
import sys

# the first lines of a process: whoever connects to another machine, or asks for its address, ends it
NO_NETWORK = """
import os, socket, sys

def refuse(*arguments):
    place = arguments[-1] if len(arguments) > 1 else arguments
    host = place[0] if isinstance(place, tuple) else place
    if host not in ("127.0.0.1", "::1", "localhost") and not (isinstance(host, (str, bytes)) and os.path.exists(host)):
        os.write(2, f"OUTSIDE {place}".encode())
        os._exit(99)

connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo
socket.socket.connect = lambda self, address: (refuse(self, address), connect(self, address))[1]
socket.getaddrinfo = lambda host, *rest, **named: (refuse((host,)), getaddrinfo(host, *rest, **named))[1]
"""


def run(code, *arguments):
    """Return (exit code, stderr) of Python `code` in a process of a user who has set nothing."""
    command = [sys.executable, "-c", NO_NETWORK + code, *map(str, arguments)]
    ours = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DISABLE_TELEMETRY")
    surroundings = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


JOB = """
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


def test_train_eval_export_and_chat_reach_no_other_machine(make_recipe, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe().to_yaml())
    # in the order that is hardest: the hub's library has read the environment before qlora can set it
    code, said = run(JOB.format(first="huggingface_hub.constants", then="qlora"), recipe, tmp_path / "out")
    assert code == 0, said
    assert len(json.loads((tmp_path / "out" / "export_report.json").read_text())["modules"]) > 0


def test_the_check_sees_what_trl_would_send():
    """Two-sided: with telemetry on, the same check ends the process."""
    code, said = run(
        """
import huggingface_hub.utils, huggingface_hub.constants
huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = False
huggingface_hub.utils.send_telemetry("trl/train", library_name="trl", library_version="1.16")
import time
time.sleep(20)
"""
    )
    assert code == 99, said
    assert "OUTSIDE" in said
