"""Nothing leaves the machine unless it is asked to: no verb looks up or reaches a host outside."""

import os
import socket
import subprocess
import sys

import pytest
from huggingface_hub.utils import _telemetry

from qlora.commands.chat import chat
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.train import train


@pytest.fixture
def reached(monkeypatch):
    """Return the hosts that anything has tried to reach; each try fails."""
    tried = []

    def refuse(host):
        tried.append(host)
        raise OSError(f"reached for {host}")

    def connect(sock, address):
        if sock.family in (socket.AF_INET, socket.AF_INET6) and not address[0].startswith(("127.", "::1", "localhost")):
            refuse(address)
        return original(sock, address)

    original = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **options: refuse(host))
    # as on a machine of a user, whatever the suite is run with; read by both when they are imported
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", False)
    return tried


def test_no_verb_reaches_outside(reached, make_recipe, tmp_path):
    run = train(make_recipe())
    evaluate(run.path)
    export(run.path, tmp_path / "out")
    assert chat(tmp_path / "out", "What is 1 plus 1?", max_new_tokens=2) is not None
    _telemetry._TELEMETRY_QUEUE.join()  # it is sent by a thread
    assert reached == []


def test_telemetry_of_the_hub_is_off_unless_the_user_says_otherwise():
    code = "import qlora, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    unset = {key: value for key, value in os.environ.items() if "TELEMETRY" not in key}
    for environment, expected in ((unset, "True"), (unset | {"HF_HUB_DISABLE_TELEMETRY": "0"}, "False")):
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
        )
        assert found.stdout.strip() == expected
