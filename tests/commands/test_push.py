"""qlora push against a hub: a real server on this machine that plays the few endpoints, and keeps what it is sent."""

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import threading
import time
from importlib import metadata
from pathlib import Path

import huggingface_hub
import pytest
import torch
from typer.testing import CliRunner

from qlora import base_model, cli, methods
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.push import push
from qlora.commands.train import train
from qlora.recipe import Model, Recipe
from qlora.system import signals
from qlora.system.errors import InputError, Interrupted
from tests.commands.test_adapter_cards import as_the_card_says
from tests.conftest import CONVERSATIONS, messages, write_jsonl

# huggingface_hub 2.4 gives httpx2 a file by the old name of the argument
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

TOKEN = "hf_" + "aB3" * 12
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
           "chat_template.jinja", "README.md"}  # fmt: skip
MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja", "export_report.json", "README.md"}  # fmt: skip


class Hub(http.server.ThreadingHTTPServer):
    """repos: {name: {"private", "files": {path: bytes}}}; refuses: {start of a path: (status, message)}; stops: the start of
    a path at which this process gets SIGTERM."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repos, self.refuses, self.objects, self.sent, self.stops = {}, {}, {}, [], None
        self.address = f"http://127.0.0.1:{self.server_port}"

    def answer(self, method, path, body):
        """Return (status, JSON or an error's text)."""
        self.sent.append((method, path, body))
        if self.stops and path.startswith(self.stops):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        for start, (status, message) in self.refuses.items():
            if path.startswith(start):
                return status, message
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            if name in self.repos:
                return 409, "You already created this model repo"
            self.repos[name] = {"private": asked.get("visibility") == "private", "files": {}}
            return 200, {"url": f"{self.address}/{name}"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/objects/"):
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if path.endswith("/objects/batch"):
            asked = json.loads(body)["objects"]
            return 200, {"objects": [
                {**one, "actions": {"upload": {"href": f"{self.address}/objects/{one['oid']}"}}} for one in asked
            ]}  # fmt: skip
        name, _, rest = path.removeprefix("/api/models/").partition("/preupload/")
        if rest:
            return 200, {"files": [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith("safetensors") else "regular",
                 "shouldIgnore": False} for one in json.loads(body)["files"]
            ]}  # fmt: skip
        name, _, rest = path.removeprefix("/api/models/").partition("/commit/")
        if rest:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.repos[name]["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.repos[name]["files"][value["path"]] = self.objects[value["oid"]]
            return 200, {"commitUrl": f"{self.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        if name in self.repos:
            repo = self.repos[name]
            siblings = [{"rfilename": path} for path in [".gitattributes", *repo["files"]]]
            return 200, {"id": name, "private": repo["private"], "siblings": siblings}
        return 404, "Repository not found"


class _Answer(http.server.BaseHTTPRequestHandler):
    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        status, content = self.server.answer(self.command, self.path.partition("?")[0], body)
        data = (json.dumps(content) if status == 200 else "{}").encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        if status != 200:
            self.send_header("X-Error-Message", content)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub that is there, and a token for it."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol, with servers of its own
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """A finished and evaluated run; made once, do not write to it."""
    folder = tmp_path_factory.mktemp("pushed")
    rows = write_jsonl(folder / "secret-project.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS])
    values = {
        "model": {"name_or_path": str(tiny_model("llama"))},
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"train": str(rows), "max_length": 128, "eval_fraction": 0.25},
        "training": {
            "max_steps": 4,
            "learning_rate": 3e-2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "warmup_ratio": 0,
        },
        "output_dir": str(folder / "run"),
    }
    run = train(Recipe.from_dict(values))
    evaluate(run.path)
    return run


@pytest.fixture(scope="module")
def model(run, tmp_path_factory):
    """The run, exported; made once, do not write to it."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(run.path, folder)
    return folder


def tree(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def no_secret(hub, *private):
    for method, path, body in hub.sent:
        for secret in (TOKEN, *map(str, private)):
            assert secret.encode() not in body, (method, path, secret)
            assert base64.b64encode(secret.encode())[:-4] not in body


# ---- what arrives ----------------------------------------------------------------------------------------------------


def test_of_a_run_its_adapter_arrives_private_and_nothing_else(run, hub, capsys):
    before = tree(run.path)
    result = push(run.path, "me/mine")
    assert tree(run.path) == before
    assert list(hub.repos) == ["me/mine"]
    repo = hub.repos["me/mine"]
    assert repo["private"] is True
    assert repo["files"].keys() == ADAPTER
    for name in ADAPTER - {"README.md", "adapter_config.json"}:
        assert repo["files"][name] == (run.adapter / name).read_bytes(), name
    ours, sent = (
        json.loads(one)
        for one in ((run.adapter / "adapter_config.json").read_text(), repo["files"]["adapter_config.json"])
    )
    base = Path(ours.pop("base_model_name_or_path"))
    assert sent.pop("base_model_name_or_path") == base.name  # and not where it lies
    assert sent == ours
    assert result["private"] is True
    assert result["url"] == f"{hub.address}/me/mine"
    assert {one["name"]: one["bytes"] for one in result["files"]} == {k: len(v) for k, v in repo["files"].items()}
    no_secret(hub, base.parent, run.path.parent)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ADAPTER)  # the list


def test_of_a_model_what_export_wrote_arrives(model, hub, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    for name in ("notes.txt", "optimizer.pt", ".env", "old.safetensors"):
        (folder / name).write_text("not for others")
    (folder / "checkpoints").mkdir()
    push(folder, "team/mine", public=True)
    repo = hub.repos["team/mine"]
    assert repo["private"] is False
    assert repo["files"].keys() == MODEL
    for name in MODEL - {"README.md"}:
        assert repo["files"][name] == (model / name).read_bytes(), name
    card = (model / "README.md").read_text()
    assert repo["files"]["README.md"].decode() == card.replace('"FOLDER"', '"team/mine"')
    no_secret(hub, tmp_path)


def test_a_second_push_replaces_what_the_first_has_brought(run, model, hub):
    push(run.path, "me/mine")
    assert push(run.path, "mine", license="mit")["commit"] == "0" * 40
    assert list(hub.repos) == ["me/mine"]
    assert b"\nlicense: mit\n" in hub.repos["me/mine"]["files"]["README.md"]
    with pytest.raises(
        InputError, match=r"me/mine contains files that are not part of this push \(adapter_config.json, adapter_"
    ):
        push(model, "me/mine")  # a folder of both would open as either
    assert hub.repos["me/mine"]["files"].keys() == ADAPTER


def test_what_is_there_and_public_gets_nothing_that_was_to_be_private(run, hub):
    hub.repos["me/mine"] = {"private": False, "files": {}}
    with pytest.raises(InputError, match="me/mine already exists and is public; add --public"):
        push(run.path, "me/mine")
    assert hub.repos["me/mine"]["files"] == {}
    push(run.path, "me/mine", public=True)
    assert hub.repos["me/mine"]["files"].keys() == ADAPTER
    hub.repos["me/mine"] = {"private": True, "files": {}}
    with pytest.raises(InputError, match="me/mine already exists and is private; leave --public out"):
        push(run.path, "me/mine", public=True)  # a push does not change who may see it
    assert hub.repos["me/mine"] == {"private": True, "files": {}}


@pytest.mark.parametrize("license", ["a: b", "mit\nbase_model: other/one", "", "Apache 2.0"])
def test_a_license_that_is_no_identifier_is_refused(run, hub, license):
    with pytest.raises(InputError, match="is not the id of a license"):
        push(run.path, "me/mine", license=license)
    assert hub.sent == []


def test_a_dry_run_shows_files_and_card_and_sends_nothing(run, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    done = CliRunner().invoke(cli.app, ["push", str(run.path), "me/mine", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in ADAPTER)
    assert "A LoRA adapter for" in done.output
    assert "nothing was uploaded" in done.output
    assert hub.sent == []


# ---- the card --------------------------------------------------------------------------------------------------------


def test_the_card_of_an_adapter_is_complete_and_its_lines_of_code_open_it(run, hub, tiny_model, tmp_path):
    push(run.path, "me/mine", base="owner/base", license="apache-2.0")
    text = hub.repos["me/mine"]["files"]["README.md"].decode()
    data = huggingface_hub.ModelCard(text).data.to_dict()
    assert data == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "tags": ["qlora", "lora"],
        "license": "apache-2.0",
    }
    environment = run.environment()
    for digest in [*environment["base_model"]["sha256"].values(), *(one["sha256"] for one in environment["data"])]:
        assert f"`{digest}`" in text
    for said in ("secret-project.jsonl", "18 rows to train on, 6 held out", "4 steps", "      learning_rate: 0.03",
                 "      quant_type: nf4", f"torch {metadata.version('torch')}", "loss on 6 rows (qlora eval)"):  # fmt: skip
        assert said in text, said
    assert "None" not in text
    scores = json.loads(run.eval_file.read_text())
    assert f"| {scores['before']['loss']:.4f} | {scores['loss']:.4f} |" in text

    opened = as_the_card_says(hub.repos["me/mine"]["files"], tmp_path / "downloaded", tiny_model("llama"))
    section = Model(name_or_path=str(tiny_model("llama")))
    ours = base_model.load(base_model.find(section), section, run.recipe().quantization)
    ours = methods.load(ours, run.adapter)
    ids = torch.tensor([[3, 40, 50, 60]])
    with torch.no_grad(), ours.disable_adapter():
        without = ours(ids).logits.float()
    with torch.no_grad():
        expected, found = ours(ids).logits.float(), opened(ids).logits.float()
    assert (found - expected).abs().max() < 0.1  # bfloat16 has steps of 1/32 there
    assert (expected - without).abs().max() > 0.5


def test_the_card_of_a_model_says_what_it_was_made_of(run, model):
    text = (model / "README.md").read_text()
    data = huggingface_hub.ModelCard(text).data.to_dict()
    assert (data["library_name"], data["tags"]) == ("transformers", ["qlora", "merged"])
    assert "base_model" not in data  # a folder of this machine
    environment = run.environment()
    assert str(Path(environment["base_model"]["folder"]).parent) not in text
    for digest in [*environment["base_model"]["sha256"].values(), *(one["sha256"] for one in environment["data"])]:
        assert f"`{digest}`" in text
    assert "None" not in text
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert len(tables) == 4
    for lines in tables:  # as many cells in each line as in the header
        assert len({line.count("|") for line in lines}) == 1, lines


def test_a_base_of_the_hub_is_named_with_its_revision(run, hub, tmp_path):
    folder = shutil.copytree(run.path, tmp_path / "run")
    environment = json.loads((folder / "environment.json").read_text())
    environment["base_model"] |= {"name_or_path": "owner/base", "revision": "c0ffee"}
    (folder / "environment.json").write_text(json.dumps(environment))
    push(folder, "me/mine")
    text = hub.repos["me/mine"]["files"]["README.md"].decode()
    assert huggingface_hub.ModelCard(text).data.base_model == "owner/base"
    assert "[owner/base](https://huggingface.co/owner/base), revision `c0ffee`." in text
    assert 'from_pretrained(\n        "owner/base", revision="c0ffee", ' in text
    assert json.loads(hub.repos["me/mine"]["files"]["adapter_config.json"])["base_model_name_or_path"] == "owner/base"


def test_a_base_that_was_a_folder_is_no_name_of_the_hub_wherever_it_is_pushed_from(run, hub, tmp_path):
    folder = shutil.copytree(run.path, tmp_path / "run")
    environment = json.loads((folder / "environment.json").read_text())
    environment["base_model"]["name_or_path"] = "private/tiny"  # relative to where it was trained; not to here
    (folder / "environment.json").write_text(json.dumps(environment))
    push(folder, "me/mine")
    text = hub.repos["me/mine"]["files"]["README.md"].decode()
    assert huggingface_hub.ModelCard(text).data.base_model is None
    assert "Base: `tiny`, read from a folder" in text
    assert "private/tiny" not in text


# ---- what is refused -------------------------------------------------------------------------------------------------


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-200])


REFUSED = {
    "an export that was not proven": (
        "model", lambda f: change_json(f / "export_report.json", verified=False), "without a proof"
    ),
    "an export without its report": ("model", lambda f: (f / "export_report.json").unlink(), "is not an export"),
    "a report that is none": ("model", lambda f: (f / "export_report.json").write_text("[1]"), "not the report"),
    "a report of another GGUF": ("model", lambda f: change_json(f / "export_report.json", gguf="x"), "not the report"),
    "a config that is cut off": ("model", lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "a tokenizer that is a web page": ("model", lambda f: (f / "tokenizer.json").write_text("<html>"), "is a web page"),
    "a card that is no text": ("model", lambda f: (f / "README.md").write_bytes(b"\xff"), "README.md line 1: not UTF-8"),
    "weights that are cut off": ("model", lambda f: flip(f / "model.safetensors"), "model.safetensors is not a complete"),
    "no weights": ("model", lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "a model without its card": ("model", lambda f: (f / "README.md").unlink(), "README.md is missing; export it again"),
    "a model without its tokenizer": ("model", lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "a card without metadata": ("model", lambda f: (f / "README.md").write_text("# mine"), "does not begin with metadata"),
    "a link": (
        "model", lambda f: ((f / "tokenizer.model").symlink_to("/etc/passwd")), "a symbolic link to /etc/passwd"
    ),
    "a token in a file": (
        "model", lambda f: (f / "chat_template.jinja").write_text("hf_" + "x" * 34), "chat_template.jinja contains a token"
    ),
    "a token of another service": (
        "model", lambda f: (f / "chat_template.jinja").write_text("ghp_" + "x1" * 18), "chat_template.jinja contains a token"
    ),
    "an address with a password": (
        "model", lambda f: change_json(f / "tokenizer_config.json", source="https://me:pa55w@host/x"), "a token or a password"
    ),
    "the token that is used": (
        "model", lambda f: change_json(f / "tokenizer_config.json", token=TOKEN), "tokenizer_config.json contains a token"
    ),
    "a run without adapter": ("run", lambda f: shutil.rmtree(f / "adapter"), "did not finish training"),
    "an adapter that is cut off": (
        "run", lambda f: flip(f / "adapter" / "adapter_model.safetensors"), "changed since the training"
    ),
    "an adapter by itself": ("run/adapter", lambda f: None, "give the run folder that contains it"),
    "a run without its record": ("run", lambda f: (f / "metrics.jsonl").unlink(), "is damaged"),
    "a folder of something else": ("run/checkpoints", lambda f: None, "is not an export"),
    "nothing": ("none", lambda f: None, "neither a run nor a model at"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_whole_or_not_proven_is_refused_and_nothing_is_sent(run, model, hub, tmp_path, what):
    kind, break_it, expected = REFUSED[what]
    if kind != "none":
        shutil.copytree(model if kind == "model" else run.path, tmp_path / kind.partition("/")[0])
    folder = tmp_path / kind
    break_it(folder)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=expected):
        push(folder, "me/mine")
    assert hub.sent == []
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("path", "status", "expected"),
    [
        ("/api/repos/create", 401, "the token is not valid; run `hf auth login` again"),
        ("/api/repos/create", 403, "the token has no write access there"),
        (
            "/api/repos/create",
            409,
            "no such owner or repository, or the token has no access",
        ),  # the name is of something else
        ("/api/models/me/mine/preupload", 403, "the token has no write access there"),
        ("/objects/", 403, "the token has no write access there"),
        ("/api/models/me/mine/commit", 500, "try again later"),
        ("/api/models/me/mine/commit", 413, "a file is too large for the hub"),
    ],
)
def test_a_refusal_of_the_hub_is_one_message_and_nothing_is_there(run, hub, path, status, expected):
    hub.refuses[path] = (status, "the hub's own words")
    with pytest.raises(InputError, match=expected) as refused:
        push(run.path, "me/mine")
    assert "the hub refuses me/mine" in str(refused.value)
    assert TOKEN not in str(refused.value)
    assert hub.repos.get("me/mine", {"files": {}})["files"] == {}


@pytest.mark.parametrize("place", ["/objects/", "/api/models/me/mine/commit"])
def test_a_push_that_is_stopped_leaves_all_of_it_or_none(run, hub, place):
    hub.stops = place

    def pushed():
        push(run.path, "me/mine")
        time.sleep(5)

    with pytest.raises(Interrupted) as stopped, signals.handled():
        pushed()
    assert (stopped.value.exit_code, stopped.value.message) == (
        143,
        "push interrupted; me/mine has either all of its files or none",
    )
    assert hub.repos["me/mine"]["files"].keys() in (set(), ADAPTER)


def test_no_network_no_token_and_no_name(run, hub, monkeypatch):
    with pytest.raises(InputError, match="'a/b/c' is not OWNER/NAME"):
        push(run.path, "a/b/c")
    hub.shutdown()
    hub.server_close()
    with pytest.raises(InputError, match=r"the hub at http://127.0.0.1:\d+ cannot be reached: .*; try again later"):
        push(run.path, "me/mine")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        push(run.path, "me/mine")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(InputError, match="no token for the hub; run `hf auth login`, or set HF_TOKEN"):
        push(run.path, "me/mine")
