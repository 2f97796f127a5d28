"""The files of a run or an exported model that go to the hub."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from ... import base_model, methods
from ...exporter import REPORT
from ...exporter.model_card import adapter_card, addressed, shown_name
from ...runs.folder import RunDir, refuse_recipe
from ...system.errors import InputError
from ...system.events import note
from ...system.files import read as read_text
from ...system.files import read_object
from ..opening.chosen_task import task_of
from .run_facts import origin_of

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
_MORE_TEMPLATES = "additional_chat_templates"  # a folder, where a tokenizer has several
_OF_MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json", REPORT, "LICENSE", "NOTICE")


def files_to_push(target, repo, base=None, license=None) -> dict:
    """Return {name: path or bytes} of what is uploaded of a run (its adapter) or of an exported and proven model.

    Its card is addressed to `repo`. base, license: as in `push`.

    Raises:
        InputError: not a finished run and not a proven model, or a file that is not what it should be.
    """
    target = Path(target)
    refuse_recipe(target)
    title = repo.rpartition("/")[2]
    files = _of_run(RunDir.open(target), base, title) if RunDir.is_run(target) else _of_model(target)
    text = files[CARD] if isinstance(files[CARD], str) else read_text(files[CARD], "the card")
    try:
        text = addressed(text, repo, base, license)
    except InputError as error:
        raise InputError(f"{target}: {error}") from None
    return files | {CARD: text.encode()}


def _of_run(run, base, title):
    """Return {name: path, bytes, or text} of the files of a run to upload: its adapter, not its checkpoints and logs."""
    if not (run.adapter / methods.CONFIG).is_file():
        raise InputError(
            f"{run.path}: full fine-tuning makes no adapter; export the run, and push the model: "
            f"qlora export {shlex.quote(str(run.path))} --out FOLDER"
        )
    read = methods.read(run.adapter)
    recipe, origin = run.recipe(), origin_of(run)
    named = base or shown_name(origin.base["name_or_path"])[0]
    config = {**read.config, "base_model_name_or_path": named}
    files = _there(run.adapter, [methods.WEIGHTS, *_TOKENIZER, base_model.image_processor.FILE])
    files[methods.CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    quantization = recipe.quantization and recipe.quantization.model_dump()
    files[CARD] = adapter_card(title, named, read.config, quantization, origin, task_of(recipe))
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
    reads = "tokenizer.json" if base_model.task_of_folder(folder).HAS_TOKENS else base_model.image_processor.FILE
    for needed in ("config.json", reads, CARD):
        if needed not in files:
            raise InputError(f"{folder}: {needed} is missing; export it again")
    found = {name: read_object(path) for name, path in files.items() if path.suffix == ".json"}
    if "auto_map" in found["config.json"]:
        files |= _there(folder, [path.name for path in folder.glob("*.py")])
    kept = sorted({path.name for path in folder.iterdir()} - {Path(name).parts[0] for name in files})
    if kept:
        note(f"          not uploaded: {', '.join(kept)}")
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
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / REPORT}: not the report that export wrote ({error!r}); export it again") from None
    if not proven:
        raise InputError(f"{folder} was exported without a proof; export it again without export.verify: off")
    return {"bytes": size, "served": served}


def _there(folder, names):
    """Return {name: path} of those files that exist in `folder`; raises InputError for symbolic links."""
    files = {}
    more = [f"{_MORE_TEMPLATES}/{path.name}" for path in sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))]
    for name in [*names, *more]:
        path = folder / name
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link to {path.readlink()}; replace it with the file itself")
        if (Path(name).name == name or name in more) and path.is_file():
            files[name] = path
    return files
