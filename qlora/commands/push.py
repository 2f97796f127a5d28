"""qlora push: upload the adapter of a run, or an exported model, to the hub; private by default."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from rich.text import Text

from .. import base_model, methods
from ..exporter import REPORT
from ..exporter.model_card import adapter_card, addressed, shown_name
from ..jobs.run_facts import origin_of
from ..runs.folder import RunDir
from ..system import hub
from ..system.errors import InputError, Interrupted
from ..system.files import read as read_text
from ..system.files import read_object
from ..terminal import console

CARD = "README.md"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_OF_MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json", REPORT, "LICENSE", "NOTICE")


def push(target, repo, *, public=False, base=None, license=None, dry_run=False) -> dict:
    """Upload a run's adapter, or an exported and proven model folder; return {"repo", "private", "files", "url", "commit"}.

    repo: OWNER/NAME on the hub, made as a private one unless `public`. base: what a base that was a local folder is called
    on the hub. license: for the card; without it the card names none. dry_run: print files and card, upload nothing
    ("url" and "commit" are None). The token is that of the environment (HF_TOKEN) or of the hub login.

    Raises:
        InputError: not a finished run and not a proven model, a file that is not what it should be or holds a token, no
            token, or the hub cannot be reached or refuses. The repository is as it was.
        Interrupted: by SIGINT or SIGTERM; the repository has all of the files or none.
    """
    hub.refuse_name(repo)
    if base is not None:
        hub.refuse_name(base)
    target = Path(target)
    title = repo.rpartition("/")[2]
    files = _of_run(RunDir.open(target), base, title) if RunDir.is_run(target) else _of_model(target)
    text = files[CARD] if isinstance(files[CARD], str) else read_text(files[CARD], "the card")
    try:
        text = addressed(text, repo, base, license)
    except InputError as error:
        raise InputError(f"{target}: {error}") from None
    files[CARD] = text.encode()
    hub.refuse_secrets(files)
    sizes = {name: hub.num_bytes(content) for name, content in sorted(files.items())}
    private = "public" if public else "private"
    console.table(
        f"{target} to {repo}, {private}", ["", "size"], [[name, console.size(size)] for name, size in sizes.items()]
    )
    result = {
        "repo": repo,
        "private": not public,
        "files": [{"name": name, "bytes": size} for name, size in sizes.items()],
        "url": None,
        "commit": None,
    }
    if "license:" not in text:
        console.say(
            "license   not set in the model card; look up the base model's license and set yours with --license ID"
        )
    if dry_run:
        console.show(Text(text))
        console.say("nothing was uploaded")
        return result
    if not sys.stderr.isatty():
        disable_progress_bars()  # of the hub's library
    console.say(f"uploading {console.size(sum(sizes.values()))}")
    try:
        url, commit = hub.send(files, repo, public, f"{target.name}, by qlora push")
    except Interrupted as stopped:
        raise Interrupted(stopped.number, f"push interrupted; {repo} has either all of its files or none") from None
    console.say(f"pushed    {len(files)} files, {private}: {url}")
    return result | {"url": url, "commit": commit}


def _of_run(run, base, title):
    """Return {name: path, bytes, or text} of the files of a run to upload: its adapter, not its checkpoints and logs."""
    read = methods.read(run.adapter)
    recipe, origin = run.recipe(), origin_of(run)
    named = base or shown_name(origin.base["name_or_path"])[0]
    config = {**read.config, "base_model_name_or_path": named}
    files = _there(run.adapter, [methods.WEIGHTS, *_TOKENIZER])
    files[methods.CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    quantization = recipe.quantization and recipe.quantization.model_dump()
    files[CARD] = adapter_card(title, named, read.config, quantization, origin)
    return files


def _of_model(folder):
    """Return {name: path} of an exported model; raises InputError unless it is complete and was proven."""
    if not folder.is_dir():
        raise InputError(
            f"neither a run nor a model at {folder}; `qlora train RECIPE` makes a run, `qlora export RUN` a model"
        )
    if (folder / methods.CONFIG).is_file():
        raise InputError(
            f"{folder} is an adapter alone; give the run folder that contains it, which records how it was trained"
        )
    report = _read_report(folder)
    weights = base_model.weight_files(folder)
    stored = sum((folder / name).stat().st_size for name in set(weights.values()))
    if stored < report["bytes"]:
        raise InputError(
            f"{folder}: has {stored:,} bytes of weights, but {report['bytes']:,} were exported; export it again"
        )
    names = [*_OF_MODEL, *_TOKENIZER, *sorted(set(weights.values())), CARD]
    names += report["served"] + sorted(path.name for path in folder.glob("*processor_config.json"))
    files = _there(folder, [name for name in names if name])
    for needed in ("config.json", "tokenizer.json", CARD):
        if needed not in files:
            raise InputError(f"{folder}: {needed} is missing; export it again")
    found = {name: read_object(path) for name, path in files.items() if path.suffix == ".json"}
    if "auto_map" in found["config.json"]:
        files |= _there(folder, [path.name for path in folder.glob("*.py")])
    kept = sorted({path.name for path in folder.iterdir()} - files.keys())
    if kept:
        console.say(f"          not uploaded: {', '.join(kept)}")
    return files


def _read_report(folder):
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        proven, size, served = report["verified"] is True, int(report["bytes"]), report.get("gguf")
        served = [served["file"], served["modelfile"]] if served else []
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not an export: it has no {REPORT}; `qlora export RUN --out FOLDER` makes one"
        ) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder / REPORT}: not the report that export wrote ({error!r}); export it again") from None
    if not proven:
        raise InputError(f"{folder} was exported without a proof; export it again without export.verify: off")
    return {"bytes": size, "served": served}


def _there(folder, names):
    """Return {name: path} of those files that exist in `folder`; raises InputError for symbolic links."""
    files = {}
    for name in names:
        path = folder / name
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link to {path.readlink()}; replace it with the file itself")
        if Path(name).name == name and path.is_file():
            files[name] = path
    return files
