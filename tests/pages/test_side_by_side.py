"""The page of `qlora chat --web`: it answers and takes votes, and reaches nobody else."""

import importlib.util
import json
import urllib.error
import urllib.request

import pytest

from qlora.commands.web import serve as serve_command
from qlora.evaluation.sampling import Sampling
from qlora.jobs.opening.routed import open_routed
from qlora.jobs.talking.side_by_side import SideBySide
from qlora.pages import side_by_side
from qlora.system.errors import InputError

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="no gradio; pip install '.[web]'")


def test_without_gradio_it_says_what_to_install(trained_once, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else found(name, *rest)
    )
    with pytest.raises(InputError, match=r"--web needs the package gradio; install it:  pip install 'gradio"):
        serve_command(trained_once("llama").path)


@needs_gradio
@pytest.mark.filterwarnings("ignore")
def test_the_page_answers_takes_votes_and_reaches_nobody_else(trained_once, tmp_path):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    with open_routed(trained_once("llama").path) as model:
        compared = SideBySide(model, tmp_path / "votes.jsonl")
        address, stop = side_by_side.serve(compared, Sampling(6))
        try:
            client = Client(address, verbose=False, analytics_enabled=False)
            settings = (True, "", 6, 0, 1, 0, "")
            left, right, _ = client.predict("What is 1 plus 2?", *settings, api_name="/ask")
            assert {left["label"], right["label"]} == {"Left", "Right"}  # blind
            left, right, tally = client.predict(api_name="/vote_right")
            assert tally.startswith("1 vote: ")
            vote = json.loads((tmp_path / "votes.jsonl").read_text())
            assert right["label"] == f"Right: {vote['winner']}"
            expected = {who: model.answer("What is 1 plus 2?", name, max_new_tokens=6) for who, name in BOTH.items()}
            assert {left["label"]: left["value"], right["label"]: right["value"]} == {
                f"Left: {vote['left']}": expected[vote["left"]],
                f"Right: {vote['winner']}": expected[vote["winner"]],
            }
            with pytest.raises(AppError, match="seed is 'x'; give a number from 0, or none"):
                client.predict("What?", *settings[:-1], "x", api_name="/ask")

            with urllib.request.urlopen(address) as answer:
                assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
                assert b"fonts.googleapis" not in answer.read()
            rebound = urllib.request.Request(address, headers={"Host": "other.example"})
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(rebound)
            port = int(address.rstrip("/").rpartition(":")[2])
            with pytest.raises(InputError, match=f"port {port} is in use"):
                side_by_side.serve(compared, Sampling(6), port=port)
        finally:
            stop()


BOTH = {"base": "base", "tuned": None}
