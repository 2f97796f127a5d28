"""A server is started as the script says, and answers the openai client as the model answers here."""

import importlib.util
import subprocess
import sys

import pytest

from qlora.commands.export import export
from qlora.jobs.opening.routed import open_routed
from tests.conftest import CONVERSATIONS
from tests.test_layout import ROOT

SCRIPT = ROOT / "scripts" / "serve_check.py"
MISSING = [name for name in ("openai", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]


def run(*words):
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=300)


def test_vllm_gets_the_base_and_the_adapters_by_name(trained_once):
    run_folder = trained_once("llama")
    base = run_folder.recipe().model.name_or_path
    done = run(base, "--server", "vllm", "--adapter", f"mine={run_folder.adapter}", "--dry-run")
    assert f"vllm serve {base} --host 127.0.0.1 --port " in done.stdout
    assert f" --enable-lora --max-lora-rank 8 --lora-modules mine={run_folder.adapter}\n" in done.stdout
    refused = run(base, "--server", "transformers", "--adapter", f"mine={run_folder.adapter}", "--dry-run")
    assert (refused.returncode, "whole models only" in refused.stderr) == (1, True)


def test_vllm_gets_the_largest_rank_of_a_pattern(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "rank_pattern": {"q_proj": 40}}')
    done = run("BASE", "--server", "vllm", "--adapter", f"mine={tmp_path}", "--dry-run")
    assert " --max-lora-rank 64 " in done.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [("mine", "--adapter mine: write NAME=FOLDER"), ("mine=nowhere", "for a run give RUN/adapter")],
)
def test_an_adapter_that_is_none_is_refused_in_words(given, said):
    refused = run("BASE", "--server", "vllm", "--adapter", given, "--dry-run")
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}; pip install 'transformers[serving]'")
def test_transformers_serve_answers_the_openai_client_as_the_exported_model(trained_once, tmp_path):
    folder, prompt = tmp_path / "mine", CONVERSATIONS[5][0][1]
    export(trained_once("llama").path, folder, "float32")
    done = run(folder, "--server", "transformers", "--prompt", prompt, "--max-tokens", "12")
    assert done.returncode == 0, done.stderr[-3000:]
    with open_routed(folder) as model:
        assert f"{folder}: {model.answer(prompt, max_new_tokens=12)}" in done.stdout
