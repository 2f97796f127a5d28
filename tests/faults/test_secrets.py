"""Tokens of the environment and of the home folder are in no file and no message, whatever happens."""

import http.server
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qlora
from qlora import process
from qlora.system.errors import InputError
from qlora.system.secrets import names_secret, redacted
from tests.faults.test_recipes import PASSWORD, SECRETS, TOKENS
from tests.local_server import served

NAMES = """HF_TOKEN HUGGING_FACE_HUB_TOKEN HUGGINGFACE_TOKEN WANDB_API_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
AWS_SESSION_TOKEN OPENAI_API_KEY ANTHROPIC_API_KEY GITHUB_TOKEN GH_TOKEN COMET_API_KEY NEPTUNE_API_TOKEN MLFLOW_TRACKING_PASSWORD
AZURE_STORAGE_KEY DATABASE_URL MY_OWN_SECRET AN_ORDINARY_VARIABLE""".split()
CANARIES = {name: f"canary{number:02d}of{name.lower()}" for number, name in enumerate(NAMES)}
HOME = {
    ".netrc": "machine huggingface.co login me password canaryofnetrc",
    ".git-credentials": "https://me:canaryofgit@huggingface.co",
    ".cache/huggingface/token": "canaryofhub",
    ".cache/huggingface/stored_tokens": "[mine]\nhf_token = canaryofstored",
    ".aws/credentials": "[default]\naws_secret_access_key = canaryofaws",
}
SCRIPT = """
import json, sys
from qlora import cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["qlora", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        print("exit", ended.code, file=sys.stderr)
"""


class Echo(http.server.BaseHTTPRequestHandler):
    """A hub that says no, and repeats in all it says what it was sent."""

    asked: list = []  # noqa: RUF012

    def do_GET(self):
        sent = f"{self.headers.get('Authorization')} https://me:{PASSWORD}@host/x?token=canaryofurl"
        self.asked.append(sent)
        body = json.dumps({"error": f"no access with {sent}"}).encode()
        self.send_response(403)
        self.send_header("X-Error-Message", f"no access with {sent}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    with served(Echo) as address:
        yield address


def holding(folder, text):
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_no_file_and_no_message_of_a_run_holds_a_token(make_recipe, tmp_path, hub):
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    for name, content in HOME.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(content)
    recipe = make_recipe(output_dir=str(work / "run"), training={"save_steps": 1, "eval_steps": 1})
    file = work / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    verbs = [
        ["data", str(file), "--html", str(work / "page.html")],
        ["train", str(file)],
        ["eval", str(work / "run"), "--json"],
        ["export", str(work / "run"), "--out", str(work / "model")],
        ["train", str(file), "output_dir=other", "model.name_or_path=owner/none"],
        ["train", str(file), "output_dir=other", "data.train={name: owner/none}"],
        ["export", f"https://me:{PASSWORD}@host/{CANARIES['HF_TOKEN']}", "--out", "x"],
        ["chat", TOKENS[0], "--prompt", "x"],
        ["train", CANARIES["HF_TOKEN"]],
    ]
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "XDG_")) and name != "QLORA_CACHE"
    }
    environment = kept | CANARIES | {
        "HOME": str(home), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
        "HTTPS_PROXY": f"http://me:{PASSWORD}@127.0.0.1:9", "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(qlora.__file__).parents[1]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(verbs)],
        cwd=work, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    said = done.stdout + done.stderr
    ends = [line for line in done.stderr.splitlines() if line.startswith("exit ")]
    assert ends == ["exit 0"] * 4 + ["exit 2"] * 5, said
    assert any(CANARIES["HF_TOKEN"] in sent for sent in Echo.asked)  # it was sent to the hub, and came back
    assert "no access with Bearer *** https://***@host/x?***" in said
    for secret in [*CANARIES.values(), *(text.split()[-1] for text in HOME.values()), PASSWORD, "canaryof", TOKENS[0]]:
        assert secret not in said, said
        assert not holding(work, secret), secret
        assert set(holding(home, secret)) <= {home / name for name in HOME}
    # the same search finds what is there
    assert {path.name for path in holding(work, "owner/none")} == set()
    assert {"recipe.yaml", "page.html"} <= {path.name for path in holding(work, str(work))}
    assert {path.suffix for path in work.rglob("*") if path.is_file()} >= {
        ".safetensors",
        ".json",
        ".jsonl",
        ".md",
        ".yaml",
    }
    assert list(work.rglob("events.out.tfevents*"))


@pytest.mark.parametrize("how", SECRETS)
def test_no_message_repeats_what_looks_like_a_token(how):
    text, _, secret = SECRETS[how]
    if secret in (*TOKENS,) or "@host" in text or "Signature" in text:
        said = str(InputError(f"the hub says no: {text}; try again"))
        assert secret not in said
        assert said.startswith("the hub says no: ")
        assert said.endswith("; try again")


def test_no_message_repeats_a_secret_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_OWN_TOKEN", "plainwords2")
    monkeypatch.setenv("MY_OWN_PASSPHRASE", "correcthorsebatterystaple")
    monkeypatch.setenv("MY_OWN_VARIABLE", "otherwords2")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    assert str(InputError("plainwords2 and otherwords2")) == "*** and otherwords2"
    assert str(InputError("correcthorsebatterystaple")) == "***"


def test_a_word_or_a_path_in_the_environment_hides_nothing_of_a_message(monkeypatch, tmp_path):
    monkeypatch.setenv("PASSWORD", "training")
    monkeypatch.setenv("CI_TOKEN", "Disabled")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    text = f"training.seed in {tmp_path}/recipe.yaml: Disabled"
    assert str(InputError(text)) == text


def test_a_traceback_of_a_bug_repeats_no_token(capsys):
    try:
        raise RuntimeError(f"no access with {TOKENS[0]}")
    except RuntimeError as error:
        process._show_bug(RuntimeError, error, error.__traceback__)
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("RuntimeError: no access with ***\n")


@pytest.mark.parametrize(
    "text",
    [
        "model.name_or_path org/sk-learn-hf_tiny: no such folder",
        "org/sk-learn-text-classification-of-2024, org/hf_tiny_llama_instruct, Org/sk-Learn-for-everybody-at-home",
        "data/sk-SK-wikipedia-20240101.jsonl, runs/sk-Llama-3-8B-instruct-lora-r16, xoxo-conversations.jsonl",
        "https://huggingface.co/org/name/resolve/main/config.json?download=true",
        "git@github.com:org/name, ssh://git@host/name, me@host",
        "0123456789abcdef0123456789abcdef01234567",
        "data.train.0: tokens 5, token 7; the token <|im_end|> is no token",
        "C:\\models\\x, http://localhost:8080/x, 12:30:00@5",
    ],
)
def test_what_is_no_token_is_left_as_it_is(text):
    assert str(InputError(text)) == text


def test_names_of_tokens_are_told_from_names_of_fields():
    from tests.faults.test_recipes import FIELDS

    assert not [field for field in FIELDS if names_secret(field)]
    assert all(
        names_secret(name)
        for name in NAMES
        if name not in ("DATABASE_URL", "AN_ORDINARY_VARIABLE", "AZURE_STORAGE_KEY")
    )


def test_a_key_that_was_read_with_its_line_feed_is_not_said(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "canary-of-a-key\n")
    assert redacted("Incorrect API key provided: canary-of-a-key.") == "Incorrect API key provided: ***."
