"""Start a server with a model or an adapter, ask it one question with the openai client, and stop it again:

    python scripts/serve_check.py models/mine --server transformers
    python scripts/serve_check.py models/mine --server vllm
    python scripts/serve_check.py BASE --server vllm --adapter mine=runs/mine/adapter

Prints the server's command first; then a line for each name that answers. Needs the openai client, and for transformers
`pip install 'transformers[serving]'`, for vLLM `pip install vllm`. --dry-run prints the command and starts nothing.
"""

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

HOST = "127.0.0.1"


def command_of(server, model, adapters, port):
    """Return the words that start `server`; adapters: {name: folder of a PEFT adapter}."""
    if server == "transformers":
        if adapters:
            sys.exit("transformers serve answers with whole models only: export the run, or take --server vllm")
        return [
            sys.executable,
            "-m",
            "transformers.cli.transformers",
            "serve",
            model,
            "--host",
            HOST,
            "--port",
            str(port),
        ]
    words = ["vllm", "serve", model, "--host", HOST, "--port", str(port)]
    if adapters:
        power = (
            1 << (max(8, *map(rank_of, adapters.values())) - 1).bit_length()
        )  # vLLM takes few other ranks than powers of two
        words += ["--enable-lora", "--max-lora-rank", str(power), "--lora-modules"]
        words += [f"{name}={folder}" for name, folder in adapters.items()]
    return words


def rank_of(folder):
    """Return the largest rank of the LoRA adapter in a folder."""
    file = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        sys.exit(f"--adapter {folder}: no LoRA adapter there, with a rank r in {file}; for a run give RUN/adapter")


def wait_until_up(process, port, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            sys.exit(f"the server ended with code {process.returncode}; its last lines are above")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    sys.exit(f"the server did not answer within {seconds} s; give it more with --seconds")


def ask(port, name, prompt, max_tokens):
    """Return the greedy answer of what the server calls `name`, streamed."""
    import openai

    client = openai.OpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="none")
    messages = [{"role": "user", "content": prompt}]
    pieces = client.chat.completions.create(
        model=name, messages=messages, temperature=0, max_tokens=max_tokens, stream=True
    )
    return "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)


def free_port():
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        return listening.getsockname()[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported folder; with --adapter the base, a folder or hub name")
    parser.add_argument("--server", choices=["transformers", "vllm"], required=True)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--prompt", default="What can you do?")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600, help="how long it may take to start")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if unnamed := [pair for pair in given.adapter if "=" not in pair]:
        parser.error(f"--adapter {unnamed[0]}: write NAME=FOLDER")
    adapters = dict(pair.split("=", 1) for pair in given.adapter)
    model = str(Path(given.model).resolve()) if Path(given.model).exists() else given.model
    port = free_port()
    command = command_of(given.server, model, adapters, port)
    print("server   ", shlex.join(command), flush=True)
    if given.dry_run:
        return
    if shutil.which(command[0]) is None:
        sys.exit(f"no program {command[0]} here; see the top of this script")
    quiet = os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    process = subprocess.Popen(command, env=quiet, stdout=sys.stderr)
    try:
        wait_until_up(process, port, given.seconds)
        for name in [model, *adapters]:
            print(f"{name}: {ask(port, name, given.prompt, given.max_tokens)}", flush=True)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # it would keep the card's memory
            process.kill()


if __name__ == "__main__":
    main()
